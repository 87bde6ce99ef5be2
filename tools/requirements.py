"""Prints what is needed for some purposes, a requirement a line, from pyproject.toml.

python tools/requirements.py PURPOSE...: `build` (the native library), or an extra of the package.
"""

import re
import shutil
import sys
from pathlib import Path

TEXT = (Path(__file__).parent.parent / "pyproject.toml").read_text()
BUILD_TOOLS = ["cmake>=3.22", "ninja", "pybind11>=2.13", "numpy"]
#: For `make cuda-check`, where there is a CUDA compiler; no compiler comes with them.
CUDA_TOOLS = ["nvidia-cuda-cuobjdump>=13", "nvidia-cuda-nvdisasm>=13"]


def extra(name: str) -> list[str]:
    """The requirements of an extra (tomllib only came with Python 3.11)."""
    found = re.search(rf"^{name} = \[(.*?)\]", TEXT, re.MULTILINE | re.DOTALL)
    if not found:
        raise SystemExit(f"pyproject.toml has no extra named {name}")
    return re.findall(r'"([^"]+)"', found.group(1))


def needed(purpose: str) -> list[str]:
    """The requirements of one purpose."""
    if purpose == "build":
        return BUILD_TOOLS
    if purpose == "test":
        cuda = CUDA_TOOLS if shutil.which("nvcc") else []
        return ["scikit-build-core>=0.11", *cuda, *extra("test")]
    return extra(purpose)


if __name__ == "__main__":
    print("\n".join(dict.fromkeys(line for name in sys.argv[1:] for line in needed(name))))

"""Prints what the development environment needs, a requirement a line, from pyproject.toml."""

import re
import shutil
from pathlib import Path

TEXT = (Path(__file__).parent.parent / "pyproject.toml").read_text()
BUILD_TOOLS = ["cmake>=3.22", "ninja", "pybind11>=2.13", "scikit-build-core>=0.11", "numpy"]
#: For `make cuda-check`, where there is a CUDA compiler; no compiler comes with them.
CUDA_TOOLS = ["nvidia-cuda-cuobjdump>=13", "nvidia-cuda-nvdisasm>=13"]


def extra(name: str) -> list[str]:
    """The requirements of an extra (tomllib only came with Python 3.11)."""
    found = re.search(rf"^{name} = \[(.*?)\]", TEXT, re.MULTILINE | re.DOTALL)
    if not found:
        raise SystemExit(f"pyproject.toml has no extra named {name}")
    return re.findall(r'"([^"]+)"', found.group(1))


if __name__ == "__main__":
    cuda = CUDA_TOOLS if shutil.which("nvcc") else []
    print("\n".join(BUILD_TOOLS + cuda + extra("jobs") + extra("test") + extra("lint")))

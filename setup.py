"""fastdit's build: the package itself, plus the top-level `kernels/` as `fastdit.kernels`."""

from setuptools import find_packages, setup

PACKAGES = {"fastdit": "fastdit", "fastdit.kernels": "kernels"}


def packages() -> list[str]:
    """Every package under each mapped folder, by its import name."""
    return [
        ".".join([name, *sub.split(".")]) if sub else name
        for name, folder in PACKAGES.items()
        for sub in ["", *find_packages(folder)]
    ]


setup(
    packages=packages(),
    package_dir=PACKAGES,
    package_data={"fastdit": ["py.typed", "weights/*.safetensors"]},
)

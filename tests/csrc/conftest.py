"""What csrc/'s tests compile stays in pytest's cache: `pytest --cache-clear` makes it again."""

import compilers
import pytest


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("cacheprovider"):
        place = config.cache.mkdir("csrc")
        compilers.folder = lambda: place

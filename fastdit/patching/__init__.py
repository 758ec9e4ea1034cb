"""Other people's models on fastdit's ops, in place.

    handle = fastdit.patch(model)          # or: with fastdit.patched(model):
    print(handle.report())                 # every site replaced, every site skipped and why
    handle.undo()

One file per family holds its rules: how its modules are recognised, by their structure, and the
forwards that replace theirs. `rules` says what a rule is and how a forward is replaced, `probe`
proves each replacement on random weights before it is installed.
"""

from fastdit.patching.handle import Handle, Report, Site, patch, patched, unpatch

__all__ = ["Handle", "Report", "Site", "patch", "patched", "unpatch"]

"""A Hydra search path plugin: choices of a group are also found in the folder of the user's own stages."""

from pathlib import Path
from typing import ClassVar

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class OwnStagesPath(SearchPathPlugin):
    """Append the folder of the user's own stages to the search path, after conf/."""

    folder: ClassVar[Path | None] = None  # scripts/launch.py sets it

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.folder is not None:
            search_path.append("stages", f"file://{self.folder}")

"""A script's main job in this process, without what launch adds."""

from types import ModuleType

from hydra import compose, initialize_config_dir
from launch import CONF, quote_overrides
from settings import check


def run_script(script: ModuleType, *overrides: str) -> None:
    """Compose and check the configuration as a command line would, and run the script's `main`."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(script.__name__, quote_overrides(overrides))
    check(config, script.Settings)
    script.main(config)

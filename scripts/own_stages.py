"""Find stages of the user's own: a folder with Python modules, and YAML files in folders named like those of conf/.

    DIR/mine.py               class Mine: ...
    DIR/reranker/mine.yaml    _target_: mine.Mine         chosen by: stages=DIR reranker=mine

DIR is the current folder unless `stages` names another. Choices and modules of this project, and installed modules,
come before those of DIR.
"""

import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra_run import groups

from rag.types import UserError

CURRENT = "."  # the default of conf/shared.yaml
_imported: set[Path] = set()  # folders that modules are imported from
_TARGET = re.compile(r"""^\s*_target_:\s*["']?(\w+)""", re.MULTILINE)


def folder_in(arguments: Sequence[str], config_dir: Path) -> Path | None:
    """Return the folder of the user's stages for a command line as typed.

    Args:
        arguments: The command line; the last `stages=DIR` counts.
        config_dir: The folder of this project's configuration.

    Returns:
        The folder, absolute; None with stages=null, and where the current folder has no stages.

    Raises:
        UserError: The folder does not exist, has no stages, or one of its files cannot be read or is hidden by another
            of its name. In the current folder the last two are only printed, unless the file is chosen.
    """
    typed = [argument.partition("=")[2] for argument in arguments if re.match(r"\+{0,2}stages=", argument)]
    named = typed[-1] if typed else CURRENT
    if named == "null":
        return None
    folder = Path(named).expanduser().absolute()
    if not folder.is_dir():
        if re.search(r"[,(\[]", named) and any(argument in ("-m", "--multirun") for argument in arguments):
            raise UserError(f"stages={named} cannot be swept: give one folder, and sweep what it has.")
        raise UserError(f"There is no folder {named}: give one that has your stages with stages=DIR.")
    files = [] if folder.resolve() == config_dir.resolve() else _choices(folder, config_dir)
    if not files:
        if named == CURRENT:
            return None
        raise UserError(
            f"The folder {named} has no stages: put a YAML file into a folder named like the setting, such as "
            f"{Path(named, 'reranker', 'mine.yaml')}."
        )
    for file in files:
        if sentence := _unreadable(file):
            if named != CURRENT or _chosen(file.relative_to(folder), arguments):
                raise UserError(f"{sentence}: correct it.")
            print(f"{sentence}.", file=sys.stderr)
    for sentence in _hidden(files, folder, config_dir):
        if named != CURRENT:
            raise UserError(f"{sentence}: give it another name.")
        print(f"{sentence}.", file=sys.stderr)  # the files may be of another project
    return folder


def _choices(folder: Path, config_dir: Path) -> list[Path]:
    """Return the YAML files in folders that are named like a group of `config_dir`."""
    return [file for group in sorted(groups(config_dir)) for file in _yaml_files(folder / group)]


def _yaml_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.yaml") if path.is_file())


def _chosen(file: Path, arguments: Sequence[str]) -> bool:
    """Return whether a command line chooses a file, whose path is relative to the folder of the stages."""
    group = re.compile(rf"\+{{0,2}}{re.escape(file.parent.as_posix())}(@[^=]*)?=(.*)", re.S)
    found = (group.fullmatch(argument) for argument in arguments)
    return any(match and file.stem in re.split(r"[\s,()\[\]'\"]+", match[2]) for match in found)


def _unreadable(file: Path) -> str | None:
    """Return the beginning of a sentence on why Hydra cannot read a YAML file; None where it can."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from rag.runtime.records import reason

    try:
        OmegaConf.load(file)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        return f"{file}{line} is not YAML ({reason(ValueError(error.problem))})"
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        return f"{file} is not YAML ({reason(error)})"
    except OSError as error:
        if error.errno is None:  # for a number, a date
            return f"{file} has no settings"
        return f"{file} cannot be read ({error.strerror})"
    return None


def _hidden(files: Sequence[Path], folder: Path, config_dir: Path) -> Iterator[str]:
    """Yield a sentence for each choice, and each module that a choice names, that another of that name hides."""
    for file in files:
        ours = config_dir / file.relative_to(folder)
        if ours.exists():
            yield f"{file} is never used, because this project has {file.parent.name}={file.stem} already"
        for module in _TARGET.findall(file.read_text(encoding="utf-8", errors="replace")):
            own = [path for path in (folder / f"{module}.py", folder / module) if path.exists()]
            if own and (found := _found_first(module, folder)):
                yield f"{own[0]} is never used, because Python finds another module {module} first ({found})"


def _found_first(module: str, folder: Path) -> str | None:
    """Return where Python finds a module, or None where it finds that of the folder, or none."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        return None
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    inside = any(Path(place).resolve().is_relative_to(folder.resolve()) for place in places)
    return None if inside else places[0]


def import_from(folder: Path | None) -> None:
    """Let Python find modules in the folder, after all others."""
    if folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))
    if folder is not None:
        _imported.add(folder)


def choices(group: str, config_dir: Path) -> list[str]:
    """Return the names of a group's choices, those of the user's own included, in alphabetical order."""
    folders = [config_dir, *_imported]
    return sorted({file.stem for folder in folders for file in _yaml_files(folder / group)})


def _is_own(file: str) -> bool:
    return any(Path(file).is_relative_to(folder) for folder in _imported)


def searched() -> str:
    """Return where else than among the installed modules was searched, as the end of a sentence."""
    return "".join(f" or in {folder}" for folder in sorted(_imported))


def exit_sentence(error: SystemExit) -> str:
    """Return the sentence for a module that ended the program, as one without a guard of its `main` does."""
    frames = traceback.extract_tb(error.__traceback__)
    place = ([frame for frame in frames if _is_own(frame.filename)] or frames)[-1]
    return f"{place.filename}, line {place.lineno}, ended the program with exit code {error.code}: take that out."


def missing_attribute(error: BaseException) -> str | None:
    """Return the sentence for a method or an attribute of a class of the user's own that our code misses, or None.

    An error in the user's own lines is none of these: its traceback says more.
    """
    if not isinstance(error, AttributeError) or error.obj is None:
        return None
    kind = error.obj if isinstance(error.obj, type) else type(error.obj)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if file is None or not _is_own(file) or _is_own(raised_in):
        return None
    return f"{kind.__module__}.{kind.__qualname__} in {file} has no {error.name!r}: add it (see docs/extending.md)."

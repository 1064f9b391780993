"""Write the generator's model, with its adapter merged, for other programs: as a Hugging Face folder or a GGUF file.

python scripts/export.py output.path=reader
python scripts/export.py output.path=reader.gguf format=gguf dtype=q8_0 generator.adapter=DIR
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch import launch
from settings import Shared

from rag.runtime.options import Filled


@dataclass(frozen=True)
class ExportSource:
    """The weights to export, and their adapter: null or the folder; auto is the one that the project has for them."""

    weights: Filled
    adapter: Filled | None


@dataclass(frozen=True)
class ExportTarget:
    """The folder or the GGUF file to write, and whether it may replace an earlier export."""

    path: Filled
    overwrite: bool


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Shared):
    """The settings of conf/export.yaml."""

    generator: ExportSource
    output: ExportTarget
    format: Literal["huggingface", "gguf"]
    dtype: Literal["float32", "float16", "bfloat16", "q8_0"]


def main(config) -> None:
    from rag.generate.local import LocalGenerator
    from rag.models import hub
    from rag.models.export import export

    source, target = hub.local_path(config.generator.weights), Path(config.output.path).expanduser()
    adapter = LocalGenerator(str(source), adapter=config.generator.adapter).adapter
    export(
        source,
        target,
        format=config.format,
        dtype=config.dtype,
        adapter=adapter,
        overwrite=config.output.overwrite,
    )
    nbytes = sum(file.stat().st_size for file in (target.iterdir() if target.is_dir() else [target]))
    merged = f" with the adapter {adapter}" if adapter else ""
    print(f"{source.name}{merged} in {config.dtype}, {nbytes / 1e6:,.1f} MB -> {target}")


if __name__ == "__main__":
    launch(main, "export", ExportSettings)

"""Runs validations in turn and fills docs/results/validation.md with their tables and plots.

    OMP_NUM_THREADS=2 python -m benchmarks.validation concrete energy mnist fashion_mnist cifar10 almanac stories facts
    python -m benchmarks.validation --runs runs/validate_concrete/TIME runs/validate_energy/TIME

Experiments run one after the other through `whence validate`, which goes on where an earlier attempt stopped; `--runs`
takes finished runs in their place, or beside them. `--set key=value` is an override of every experiment that is run.
Tables go between the markers of the page, whose prose is written by hand; plots go beside it, as validation-NAME.svg.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.probes import write_section
from conf.keys import validation_paths
from conf.load import compose_config
from conf.schema import plain
from pipelines import validate
from pipelines.plots import save
from pipelines.validation.presentation.figures import figures, labels
from pipelines.validation.presentation.markdown import table
from pipelines.validation.presentation.sections import sections
from pipelines.validation.presentation.several import several
from pipelines.validation.presentation.tables import Section, seconds
from pipelines.validation.together import read

PAGE = Path("docs/results/validation.md")
Document = Mapping[str, Any]
TOGETHER = {
    "agreement": ("agreement", "differences"),
    "time": ("time",),
    "response": ("runs",),
    "blocks": ("blocks",),
    "sizes": ("sizes",),
}
ALONE = {
    "iterations": ("iterations",),
    "datamodels": ("datamodels", "dampings"),
    "removal": ("removal",),
    "tracing": ("tracing",),
    "scale": ("scale",),
    "ranks": ("ranks",),
}


def fill(page: Path, documents: Sequence[Document]) -> None:
    """Write every section of the page that these runs have something for, and the plots."""
    plots = draw(page.parent, documents)
    write_section(page, "provenance", provenance(documents))
    for name, wanted in TOGETHER.items():
        found = [section for section in several(documents) if section.name in wanted]
        write_section(page, name, "\n\n".join(_together(section, plots) for section in found) or "Not measured yet.")
    for name, wanted in ALONE.items():
        write_section(page, name, _alone(documents, wanted, plots) or "Not measured yet.")


def draw(folder: Path, documents: Sequence[Document]) -> dict[str, str]:
    """Write the plots as `validation-NAME.svg`, and return the file of each; plots of single runs have its name too."""
    written = {}
    for name, _, figure in figures(documents):
        written[name] = _svg(folder, name, figure)
    for label, document in zip(labels(documents), documents, strict=True):
        for name, _, figure in figures([document]):
            if name in ("scale", "removal", "tracing") and name not in written:
                written[f"{name} {label}"] = _svg(folder, f"{name}-{document['subject']}", figure)
    return written


def _svg(folder: Path, name: str, figure: Any) -> str:
    vector, raster = save(figure, folder, f"validation-{name.replace('_', '-')}")
    raster.unlink()
    return vector.name


def provenance(documents: Sequence[Document]) -> str:
    """The command, date, machine and duration of each run."""
    lines = ["| run | command | date | machine | all steps |", "| --- | --- | --- | --- | ---: |"]
    for label, document in zip(labels(documents), documents, strict=True):
        machine = document["hardware"]
        memory = f"{machine['memory_bytes'] / 1e9:.0f} GB"
        gpus = ", ".join(machine["gpus"]) or "no GPU"
        total = seconds(sum(stage["seconds"] for stage in document["stages"].values()))
        command = f"`{' '.join(['whence validate', f'experiment={_experiment(document)}', *changes(document)])}`"
        cores = "one core" if machine["cores"] == 1 else f"{machine['cores']} cores"
        place = f"{machine['processor']}, {cores}, {memory}, {gpus}"
        lines.append(f"| {label} | {command} | {document['date']} | {place} | {total} |")
    versions = documents[0]["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "ray") if name in versions)
    return "\n".join([*lines, "", f"{named}."])


def _experiment(document: Document) -> str:
    name = str(document["name"]).removeprefix("validate_")
    return "stories" if document["subject"] == "language" else name


def changes(document: Document) -> list[str]:
    """Overrides with which the experiment becomes what was run: of `corpus.limit`, of validation and of factors."""
    usual: Any = plain(compose_config([f"experiment={_experiment(document)}"], needs=validation_paths))
    ran = document["config"]
    settings = {"corpus": {"limit": ran["corpus"]["limit"]}, "validation": ran["validation"], "factors": ran["factors"]}
    return [
        f"{group}.{key}={'null' if value is None else value}"
        for group, values in settings.items()
        for key, value in values.items()
        if key != "path" and key in usual[group] and value != usual[group][key]
    ]


def _together(section: Section, plots: Mapping[str, str]) -> str:
    shown = [f"![{section.title}]({plots[name]})" for name in section.figures if name in plots]
    warned = [f"- **{warning}**" for warning in section.warnings]
    return "\n\n".join([*section.about, table(section), *(["\n".join(warned)] if warned else []), *shown])


def _alone(documents: Sequence[Document], wanted: Sequence[str], plots: Mapping[str, str]) -> str:
    """Sections of the runs that have them, with what their numbers mean once."""
    parts: list[str] = []
    said: set[str] = set()
    for label, document in zip(labels(documents), documents, strict=True):
        for section in sections(document):
            if section.name not in wanted:
                continue
            new = [text for text in section.about if text not in said]
            said.update(new)
            parts += [" ".join([f"**{label}.**", *new[:1]]), *new[1:], table(section)]
            parts += [f"**{warning}**" for warning in section.warnings]
            mine = [f"{name} {label}" for name in section.figures if f"{name} {label}" in plots]
            parts += [f"![{section.title}, {label}]({plots[name]})" for name in mine]
    names = {name: plots[name] for name in wanted if name in plots} if parts else {}
    names |= {"lds": plots["lds"]} if parts and "datamodels" in wanted and "lds" in plots else {}
    return "\n\n".join([*parts, *(f"![{name}]({file})" for name, file in names.items())])


def main(run: Callable[..., Any] = validate) -> None:
    """Run what is asked for, then fill the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", default=[])
    parser.add_argument("--runs", nargs="*", type=Path, default=[], help="folders of finished validations")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    documents = [read(folder) for folder in given.runs]
    for name in given.experiments:
        result = run(f"experiment={name}", *given.overrides)
        print(f"{name}\n\n{result.table()}\n\n{result.page_path}\n", flush=True)
        documents.append(dict(result.document))
        fill(given.page, documents)  # after each, so that a long list leaves something when it is cut short
    if not given.experiments:
        fill(given.page, documents)


if __name__ == "__main__":
    main()

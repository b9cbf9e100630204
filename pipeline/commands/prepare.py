"""`fpt prepare`: images and labels to a manifest."""

from __future__ import annotations

from pipeline.console import say, say_next, show_json, show_table
from pipeline.options import PARAMS_FILE, AsJson, Assignments, Params
from schemas.manifest import SPLITS, PrepareSummary
from schemas.text import counted


def prepare(params: Params = PARAMS_FILE, assignments: Assignments = None, as_json: AsJson = False) -> None:
    """Read images and labels, name every image by its content, draw the splits."""
    from pipeline.params import write_settings
    from pipeline.progress import ImageBar
    from pipeline.project import open_study, remind_to_watch
    from stages.prepare import prepare as run

    study = open_study(params, assignments or [])
    if study.settings.data.labels is not None:
        remind_to_watch(study, "data.labels", study.settings.data.labels)
    output = study.manifest.parent
    with ImageBar("Reading images") as bar:
        summary = run(study.settings.data, study.root, output, bar)
    write_settings(study.settings, output)
    if as_json:
        show_json(summary.model_dump(mode="json"))
        return
    _show(summary)
    if summary.quarantined:
        say(f"Set aside {counted(summary.quarantined, 'image')}: {output / 'quarantine.csv'}")
    say_next("fpt extract")


def _show(summary: PrepareSummary) -> None:
    classes = list(dict.fromkeys(name for counts in summary.counts.values() for name in counts))
    rows = [[name, *(str(summary.counts.get(split, {}).get(name, 0)) for split in SPLITS)] for name in classes]
    totals = [str(summary.split_images.get(split, 0)) for split in SPLITS]
    totals_by_noun = {"image": summary.images, "group": summary.groups, "duplicate": summary.duplicates}
    title = ", ".join(counted(count, noun) for noun, count in totals_by_noun.items())
    show_table(title, ["class", *SPLITS], [*rows, ["all", *totals]])

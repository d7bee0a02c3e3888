"""The table of supported pipelines is true: complete, for this diffusers, and as good as the issue asks."""

import json
from pathlib import Path

import diffusers
import pytest

from flowalign.pipelines.support import PATH, markdown, pipeline_classes, summary, support, text
from tests import zoo
from tests.pipelines.test_contract import FAILS


def test_every_class_of_diffusers_has_a_row():
    rows = support()
    assert {r.pipeline for r in rows} >= set(pipeline_classes())
    assert all(r.why for r in rows if r.status != "passes")


def test_made_with_this_diffusers_and_this_zoo():
    data = json.loads(PATH.read_text())
    assert data["diffusers"] == diffusers.__version__, "run `python -m tests.pipelines.make_support`"
    assert set(data["cases"]) == set(zoo.names()), "run `python -m tests.pipelines.make_support --new`"


def test_the_contract_and_the_table_agree_on_what_fails():
    assert {r.case for r in support() if r.status == "fails"} == set(FAILS)


def test_as_many_as_promised():
    rows = [r for r in support() if r.status == "passes"]
    assert len({r.pipeline for r in rows}) >= 190
    assert len({r.family for r in rows}) >= 60


@pytest.mark.parametrize("as_json", [False, True])
def test_what_the_command_line_prints(as_json):
    rows = support()
    shown = text(rows, as_json)
    if as_json:
        assert [r["pipeline"] for r in json.loads(shown)] == [r.pipeline for r in rows]
    else:
        assert summary(rows) in shown and "StableDiffusion3Pipeline" in shown


def test_the_documentation_shows_it():
    page = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
    assert markdown(support()) in page, "run `python -m tests.pipelines.make_support --docs`"

"""The table and the verdict of a comparison, on losses whose means are computed by hand."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from support.compared import KNOWN, run

from worldlm_ray.experiments.comparison_numbers import (
    alone,
    headroom,
    is_federated,
    paired,
    pareto,
    percentile,
    summarize,
)
from worldlm_ray.experiments.comparison_plots import plane
from worldlm_ray.experiments.comparison_table import best, cells, markdown, table
from worldlm_ray.experiments.verdict import equal_work, verdict
from worldlm_ray.reports.terminal import Terminal

ORACLE = run("pooled+ft", [1.8, 1.8], 2.0)


def test_the_table_of_known_losses() -> None:
    rows = {row["method"]: row for row in summarize({"runs": [*KNOWN, ORACLE]})}
    assert (rows["fedavg"]["sooner"], rows["local"]["sooner"], rows["worldlm"]["sooner"]) == (1.0, None, 1.0)
    assert rows["worldlm"]["worst_vs_local"] == pytest.approx(0.1)
    # Changes of -5 % and +10 %: nine tenths of the way between them.
    assert rows["worldlm"]["tail"] == pytest.approx(0.085)
    assert (rows["worldlm"]["gains"], rows["fedavg"]["gains"], rows["worldlm"]["clients"]) == (1, 0, 2)
    assert rows["worldlm"]["difference"] == pytest.approx(0.05)
    assert rows["worldlm"]["error"] is None, "one seed has no spread"
    # The headroom is 1 - 1.8 / 2.0 = 10 %; worldlm loses 2.5 %.
    assert rows["worldlm"]["gain"] == pytest.approx(-0.025)
    assert rows["worldlm"]["of_headroom"] == pytest.approx(-0.25)
    assert rows["pooled+ft"]["of_headroom"] == pytest.approx(1.0)
    assert rows["local"]["world"] is None, "who trains alone has no common model"
    assert (rows["fedavg"]["tokens"], rows["fedavg"]["flops"]) == (100, 6_000)
    assert "| worldlm | 2.0500 | +0.0500 | **-2.5%** | **-0.25** |" in markdown(list(rows.values()))


def test_a_difference_is_taken_seed_by_seed() -> None:
    local = [run("local", [2.0, 2.2], 9.0), run("local", [2.3, 2.3], 9.0, seed=1), run("local", [9.0], 9.0, seed=2)]
    mine = [run("fedavg", [2.0, 2.0], 2.5, seed=seed) for seed in (0, 1)]
    found = paired(mine, local)
    assert found is not None
    # -0.1 and -0.3: their standard deviation is sqrt(0.02), over sqrt(2).
    assert (found.mean, found.error, found.seeds) == (pytest.approx(-0.2), pytest.approx(0.1), 2)
    assert paired(mine, local[2:]) is None
    [row] = [row for row in summarize({"runs": [*mine, *local[:2]]}) if row["method"] == "fedavg"]
    assert cells(row)["difference"] == "-0.2000 ± 0.1000"


def test_the_setting_of_local_with_the_lowest_validation_loss_stands_for_it() -> None:
    runs = [
        run("local", [2.0, 2.0], 4.0, validation=2.5),
        run("local+lr_third", [2.2, 2.2], 4.0, validation=2.4),
        ORACLE,
    ]
    assert {each["method"] for each in alone(runs)} == {"local+lr_third"}
    found = headroom(runs)
    assert found is not None
    assert (found.share, found.method) == (pytest.approx(1 - 1.8 / 2.2), "local+lr_third")
    without = [dict(each, clients=[client | {"validation": None} for client in each["clients"]]) for each in runs]
    assert {each["method"] for each in alone(without)} == {"local"}
    assert alone([ORACLE]) == []


def test_headroom_is_over_the_seeds_of_both_methods() -> None:
    runs = [run("local", [2.0], 4.0), run("local", [9.0], 4.0, seed=1), run("pooled+ft", [1.5], 2.0)]
    found = headroom(runs)
    assert found is not None
    assert found.share == pytest.approx(0.25)
    assert headroom(runs[1:]) is None
    assert headroom([run("local", [math.nan], 4.0), ORACLE]) is None


def test_a_world_without_headroom_says_so_and_gives_no_share_of_it() -> None:
    runs = [run("local", [2.0], 4.0), run("pooled+ft", [2.1], 2.0), run("fedavg", [1.9], 2.0)]
    assert [row["of_headroom"] for row in summarize({"runs": runs})] == [None] * 3
    assert verdict(runs)[0] == (
        "Headroom H of this world: -5.0% (pooled+ft has 2.1000 nats/byte, training alone, stopped early (local), "
        "2.0000). With this budget there is nothing to win by federating here."
    )


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([3.0], 90, 3.0), ([1.0, 2.0], 90, 1.9), ([4.0, 1.0, 3.0, 2.0, 5.0], 50, 3.0), ([0.0, 10.0, 20.0], 90, 18.0)],
)
def test_a_percentile_lies_between_two_values(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == pytest.approx(expected)


def test_the_pareto_front_has_what_no_other_method_beats_in_both() -> None:
    points = {
        "a": (1.0, 3.0),
        "b": (2.0, 2.0),
        "beaten by b": (2.0, 2.5),
        "beaten by both": (3.0, 3.0),
        "c": (4.0, 1.0),
        "diverged": (math.nan, 0.0),
    }
    assert pareto(points) == ["a", "b", "c"]
    assert pareto({}) == []


def test_local_and_pooled_text_are_no_federations() -> None:
    methods = ["local", "local+lr_third", "pooled", "pooled+ft", "fedavg+ft", "worldlm"]
    assert [is_federated(method) for method in methods] == [False] * 4 + [True] * 2


def drawn(runs: list[dict[str, Any]]) -> Figure:
    figure = Figure(layout="constrained")
    plane(figure, runs)
    FigureCanvasAgg(figure).draw()
    return figure


def test_the_plane_shows_federations_pooled_text_and_training_alone() -> None:
    [axes] = drawn([*KNOWN, run("fedavg", [2.4, 2.4], 2.8, seed=1), ORACLE, run("fedper", [2.0, 2.0], 3.3)]).axes
    labels = axes.get_legend_handles_labels()[1]
    assert labels == [
        "pooled+ft  1.800 / 2.000",
        "fedper  2.000 / 3.300 (outside)",
        "worldlm  2.050 / 2.900 (outside)",
        "fedavg  2.450 / 2.900 (outside)",
        "Pareto front of the federations",
        "local  2.000: alone, no common model",
    ]
    [front] = [line for line in axes.lines if line.get_label() == labels[-2]]
    assert list(front.get_xdata()) == [2.0, 2.05]
    assert axes.get_xlim()[1] > 2.0
    assert axes.get_ylim()[1] < 2.9


def test_every_seed_of_a_method_in_the_plane_lies_within_its_frame() -> None:
    [axes] = drawn([run("fedavg", [2.0], 2.0), run("fedavg", [2.4], 2.6, seed=1), run("fedper", [2.1], 2.2)]).axes
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert left < 2.0
    assert right > 2.4
    assert bottom < 2.0
    assert top > 2.6


def test_a_plane_of_losses_that_are_not_finite_is_drawn() -> None:
    assert drawn([run("fedavg", [math.nan], math.nan), run("local", [math.nan], 1.0)]).axes
    assert drawn([run("local", [2.0], 1.0)]).axes


def test_the_best_values_are_marked_and_training_alone_gains_nothing() -> None:
    rows = summarize({"runs": KNOWN})
    marks = best(rows)
    assert marks["own"] == {"local"}
    assert marks["world"] == {"worldlm"}
    assert marks["gain"] == marks["gains"] == marks["worst_vs_local"] == marks["tail"] == {"worldlm"}
    assert "bytes_up" not in marks
    assert "| local | **2.0000** |" in markdown(rows)
    pooled = run("pooled", [1.0, 1.0], 1.0)
    assert best(summarize({"runs": [*KNOWN, pooled]})) == marks, "clients that keep their text have no such choice"
    assert verdict([*KNOWN, pooled]) == verdict(KNOWN)
    assert best(summarize({"runs": [run("local", [2.0], 4.0)]})) == {}, "one method is not the best of several"


def test_the_verdict_of_one_seed_says_what_is_not_known() -> None:
    room, own, world, members = verdict(KNOWN)
    assert room == "Headroom is not known: it needs the methods local and pooled+ft."
    assert "local is best with 2.0000 nats/byte, 0.0500 (2.4%) below worldlm. There is one seed" in own
    assert "worldlm is best with 2.9000 nats/byte, 0.1000 (3.3%) below fedavg" in world
    assert "1 of 2 clients gain under worldlm, by a mean change in loss of +2.5%" in members
    assert members.endswith("the worst off is world/c1 with +10.0%.")


def test_the_verdict_gives_the_gain_as_a_share_of_the_headroom() -> None:
    room, *_, members = verdict([*KNOWN, run("fedavg+ft", [1.9, 1.9], 2.9), ORACLE])
    assert room == (
        "Headroom H of this world: +10.0% (pooled+ft has 1.8000 nats/byte, training alone, stopped early (local), "
        "2.0000)."
    )
    assert "2 of 2 clients gain under fedavg+ft" in members
    assert members.endswith("It has 0.50 of the headroom.")


def test_the_verdict_tells_methods_apart_only_where_every_seed_agrees() -> None:
    clear = [run("a", [1.0], 2.0), run("b", [1.5], 2.1), run("a", [1.1], 2.2, seed=1), run("b", [1.2], 2.1, seed=1)]
    _, own, world, members = verdict(clear)
    assert "a is best with 1.0500 nats/byte, 0.3000 (22.2%) below b" in own
    assert "Over 2 seeds the difference is 0.1000 to 0.5000: a is ahead of b in each." in own
    assert "in 1 of them" in world
    assert "not told apart" in world
    assert "the method local was not run" in members


def test_a_method_that_diverged_is_left_out_by_name() -> None:
    _, own, *_ = verdict([run("a", [1.0], 2.0), run("b", [math.nan], 2.0)])
    assert "a has 1.0000 nats/byte" in own
    assert "Left out, since a loss is not finite: b." in own


def test_equal_work_is_said_as_it_was() -> None:
    assert equal_work(KNOWN).startswith("Every client took 10 optimizer steps in every method.")
    unequal = [run("a", [1.0], 1.0), run("b", [1.0], 1.0, steps=12), run("pooled", [1.0], 1.0, steps=40)]
    unequal[1]["tokens"] = 120
    unequal[1]["flops"] = 14_400
    said = equal_work(unequal)
    assert "trained 100 to 120 tokens in every run" in said
    assert "On pooled text, each step takes a batch of every client's text" in said
    assert said.endswith("The FLOPs of a token differ between methods, by up to 2.00 times.")


def test_the_table_fits_eighty_columns_and_is_whole_on_a_pipe() -> None:
    runs = [*KNOWN, *(run(name, [2.1, 2.3], 2.95) for name in ("worldlm+synchronous", "worldlm+merge_all", "diloco"))]
    rows = summarize({"runs": runs})
    narrow = Terminal(file=io.StringIO(), force_terminal=True, width=80, height=40, color_system=None)
    narrow.print(table(rows))
    shown = narrow.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= 80
    assert "worldlm+synchronous" in shown
    assert "2.0000*" in shown
    assert "hidden in 80 columns: " in shown
    pipe = Terminal(file=io.StringIO())
    pipe.print(table(rows))
    lines = pipe.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any("worldlm+synchronous" in line and "2.0kB" not in line and "1.00kB" in line for line in lines)

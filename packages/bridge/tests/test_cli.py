import subprocess
import sys

import pandas as pd
import pytest
from bridge import cli, validate
from bridge.exchange.command_line.flag_table import flags_of
from bridge.exchange.tables import CORRELATIONS
from bridge.report import html
from discovery_folder import make_discovery, snapshot
from validations import options


def bridge(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["bridge", *map(str, words)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_a_folder_with_a_comma_in_its_name_is_one_folder(tmp_path, monkeypatch, capsys):
    make_discovery(tmp_path / "run,1")
    code, out, err = bridge(monkeypatch, capsys, "targets", "--from", tmp_path / "run,1", "--top", 2, "--k", 20)
    assert (code, err) == (0, "")
    assert out.startswith('TARGET_LAYER="model.layers.')


def test_targets_as_shell_assignment_list_and_csv(tmp_path, monkeypatch, capsys):
    folder = make_discovery(tmp_path)
    code, out, err = bridge(monkeypatch, capsys, "targets", "--from", tmp_path, "--top", 2, "--k", 20)
    assert (code, err) == (0, "")
    counts = pd.read_csv(folder / "top_20_weights_grad_x_weight.csv")["layer"].value_counts()
    assert out.startswith(f'TARGET_LAYER="{counts.index[0]},')
    shell = subprocess.run(["sh", "-c", f"{out.strip()}; printf %s $TARGET_LAYER"], capture_output=True, text=True)
    _, listed, _ = bridge(monkeypatch, capsys, "targets", "--from", folder, "--top", 2, "--k", 20, "--format", "list")
    assert listed.split() == shell.stdout.split(",")
    _, table, _ = bridge(monkeypatch, capsys, "targets", "--from", folder, "--controls", 3, "--format=csv", "--k", 20)
    assert [line.split(",")[1] for line in table.splitlines()] == ["role"] + ["top"] * 5 + ["control"] * 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metric", "obd"], "has no metric 'obd'"),
        (["--by", "size"], "--by 'size' is unknown; choose from: count, score"),
        (["--k", "7"], "has the global top 5, 20"),
        (["--top", "0"], "no layer was asked for"),
        (["--top", "-1"], "cannot be negative"),
        (["--tpo", "3"], "unknown flag '--tpo' (did you mean '--top'?)"),
    ],
)
def test_wrong_request(tmp_path, monkeypatch, capsys, words, message):
    make_discovery(tmp_path)
    code, out, err = bridge(monkeypatch, capsys, "targets", "--from", tmp_path, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("bridge targets: error: ")
    assert err.count("\n") == 1


def test_a_negative_seed_is_refused(tmp_path, monkeypatch, capsys):
    code, _, err = bridge(monkeypatch, capsys, "correlate", "--from", tmp_path, "--seed", "-1")
    assert (code, err) == (2, "bridge correlate: error: --seed must be at least 0, not -1\n")


@pytest.mark.parametrize("command", ["targets", "validate", "correlate", "report", "compare"])
def test_every_command_says_what_is_missing_and_has_a_help_page(tmp_path, monkeypatch, capsys, command):
    assert bridge(monkeypatch, capsys, command)[::2] == (
        2,
        f"bridge {command}: error: missing --from; --help lists the flags\n",
    )
    assert bridge(monkeypatch, capsys, command, "--from", tmp_path)[0] == 2
    code, out, _ = bridge(monkeypatch, capsys, command, "--help")
    assert code == 0
    assert f"usage: bridge {command} --from PATH ... [flags]" in out


def test_every_flag_is_described():
    for command in (cli.targets, cli.validate, cli.correlate, cli.report, cli.compare):
        for flag in flags_of(command).values():
            assert flag.help, (command.__name__, flag.name)


@pytest.mark.slow
def test_correlate_and_report_rewrite_only_what_they_derive(output, python, no_plots, monkeypatch, capsys):
    validate.validate(options(output, python))
    folder = output / "validation_v"
    before = snapshot(output)
    (folder / "correlations.csv").write_text("damaged")
    (folder / "report.html").unlink()
    code, out, _ = bridge(monkeypatch, capsys, "correlate", f"--from={output}")
    assert code == 0
    assert out.split()[:2] == list(CORRELATIONS.columns)[:2]
    assert "grad_x_weight" in out
    code, out, _ = bridge(monkeypatch, capsys, "report", f"--from={folder}")
    assert code == 0
    assert out == f"report: {folder / 'report.html'}\na finding\n"
    assert snapshot(output) == before


@pytest.mark.slow
def test_correlate_and_report_find_the_single_weights_again(output, python, no_plots, monkeypatch, capsys):
    validate.validate(options(output, python, single_weights=9))
    before = snapshot(output)
    (output / "validation_v" / "correlations.csv").unlink()
    assert "weights" in bridge(monkeypatch, capsys, "correlate", f"--from={output}")[1]
    reported = []
    monkeypatch.setattr(html, "write_report", lambda validation: reported.append(validation.sampled()) or [])
    assert bridge(monkeypatch, capsys, "report", f"--from={output}")[0] == 0
    assert {"score_grad_x_weight", "score_magnitude"} <= set(reported[0])
    assert snapshot(output) == before


@pytest.mark.slow
def test_moved_folders_are_found_and_a_lost_discovery_is_named(tmp_path, output, python, no_plots, monkeypatch, capsys):
    validate.validate(options(output, python))
    moved = output.rename(tmp_path / "elsewhere")
    assert bridge(monkeypatch, capsys, "report", "--from", moved)[0] == 0
    (moved / "critical_analysis_1").rename(moved / "hidden")
    code, _, err = bridge(monkeypatch, capsys, "report", "--from", moved)
    assert code == 2
    assert "is no longer at" in err

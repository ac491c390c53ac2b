"""The commands and snippets of the integration guide, word for word, from the folders they are written for."""

import re

import pandas as pd
import pytest

DISCOVERY = """
cd critical_weight_analysis
source .venv/bin/activate

# Discover most critical weights across the entire model
python phase1_runner.py \\
  --model EleutherAI/pythia-2.8b \\
  --metric grad_x_weight grad_squared \\
  --topk 100 500 \\
  --eval-limit 100 \\
  --output discovery_results/
"""
INVESTIGATION = """
cd llm_research_project
source .venv/bin/activate

# Use discoveries to target specific layers for detailed analysis
TARGET_LAYER="gpt_neox.layers.5.mlp.dense_h_to_4h" \\
accelerate launch --config_file configs/accelerate_config.yaml \\
scripts/run_topk_perturb.py | tee logs/targeted_analysis.log
"""
MODEL_COMPARISON = """
cd critical_weight_analysis
source .venv/bin/activate
python phase1_runner.py --model gpt2 --topk 100 --output gpt2_analysis/
python phase1_runner.py --model EleutherAI/pythia-410m --topk 100 --output pythia410m_analysis/
python phase1_runner.py --model EleutherAI/pythia-2.8b --topk 100 --output pythia2.8b_analysis/
"""
COMPARISON_OF_LAYERS = """
cd critical_weight_analysis
source ../llm_research_project/.venv/bin/activate
cd ../llm_research_project
TARGET_LAYER="transformer.h.5.attn.c_attn.weight" accelerate launch scripts/run_topk_perturb.py
TARGET_LAYER="gpt_neox.layers.5.attention.query_key_value" accelerate launch scripts/run_topk_perturb.py
"""
METRIC_VALIDATION = """
cd critical_weight_analysis
source .venv/bin/activate
python phase1_runner.py --model pythia-2.8b --metric grad_x_weight --topk 50
"""
ONE_LAYER = """
cd llm_research_project
source .venv/bin/activate
TARGET_LAYER="[layer_from_critical_analysis]" accelerate launch scripts/run_topk_perturb.py
"""
SAME_SETUP = """
cd critical_weight_analysis
source .venv/bin/activate
python phase1_runner.py --model pythia-2.8b --eval-limit 100
"""
TOP_LAYERS = """
cd critical_weight_analysis
source .venv/bin/activate
python - <<'END'
# Export top critical layers from critical analysis
import pandas as pd
top_weights = pd.read_csv('outputs/critical_analysis_XXX/top_100_weights_grad_x_weight.csv')
critical_layers = top_weights['layer'].value_counts().head(5).index.tolist()

# Use these layers as TARGET_LAYER in original project
for layer in critical_layers:
    # Run original analysis on each critical layer
    print(f"Testing layer: {layer}")
END
"""


@pytest.fixture(scope="module")
def discovered(shell, workspace):
    done = shell(DISCOVERY, workspace)
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = (workspace / "critical_weight_analysis" / "discovery_results").glob("critical_analysis_*/")
    return run


def test_phase_1_writes_the_ranked_lists(discovered):
    for k in (100, 500):
        for metric in ("grad_x_weight", "grad_squared"):
            top = pd.read_csv(discovered / f"top_{k}_weights_{metric}.csv")
            assert list(top["rank"]) == list(range(1, k + 1))
            assert top["score"].is_monotonic_decreasing
            assert top["score"].iloc[0] > 0


def test_phase_2_measures_the_target_layer(shell, workspace):
    done = shell(INVESTIGATION, workspace)
    assert done.returncode == 0, done.stderr[-2000:]
    project = workspace / "llm_research_project"
    log = (project / "logs" / "targeted_analysis.log").read_text()
    for line in ("BASELINE_PERPLEXITY: ", "TOPK_PERPLEXITY: ", "CONTROL_PERPLEXITY: "):
        assert re.search(rf"^{line}\d", log, re.MULTILINE), log
    (table,) = project.glob("outputs/perturb_*/measurements.csv")
    top = pd.read_csv(table).query("selection == 'top_grad_x_weight'")
    assert top["target_layer"].tolist() == ["gpt_neox.layers.5.mlp.dense_h_to_4h"]
    assert top["delta_nll"].abs().min() > 0


def test_example_1_compares_models(shell, workspace):
    done = shell(MODEL_COMPARISON, workspace)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder in ("gpt2_analysis", "pythia410m_analysis", "pythia2.8b_analysis"):
        (top,) = (workspace / "critical_weight_analysis" / folder).glob("*/top_100_weights_grad_x_weight.csv")
        assert len(pd.read_csv(top)) == 100
    done = shell(COMPARISON_OF_LAYERS, workspace)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "MODEL: gpt2" in done.stdout
    assert f"MODEL: hub id gpt2 at revision {0:040x}" in done.stdout
    assert "MODEL: EleutherAI/pythia-2.8b" in done.stdout
    assert done.stdout.count("\nTOPK_PERPLEXITY: ") == 2


def test_example_2_and_the_snippets(shell, workspace):
    done = shell(METRIC_VALIDATION, workspace)
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = workspace / "critical_weight_analysis" / "outputs"
    (top,) = outputs.glob("critical_analysis_*/top_50_weights_grad_x_weight.csv")
    layers = pd.read_csv(top)["layer"]
    layer = layers[layers.str.startswith("gpt_neox.")].iloc[0]
    done = shell(ONE_LAYER.replace("[layer_from_critical_analysis]", layer), workspace)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"({layer}, top_grad_x_weight" in done.stdout
    done = shell(ONE_LAYER.replace("[layer_from_critical_analysis]", "lm_head"), workspace)
    assert done.returncode == 1, "the launcher's exit code"
    assert "TARGET_LAYER 'lm_head' does not tell which model it is of" in done.stderr
    done = shell(SAME_SETUP, workspace)
    assert done.returncode == 0, done.stderr[-2000:]
    (latest,) = {path.parent for path in outputs.glob("*/top_100_weights_grad_x_weight.csv")}
    latest.rename(outputs / "critical_analysis_XXX")
    done = shell(TOP_LAYERS, workspace)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.match(r"Testing layer: gpt_neox\.layers\.\d\.\w+\.\w+\n", done.stdout)

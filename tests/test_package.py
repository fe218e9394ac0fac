"""The installed package: what it imports, what it is made of, and what it says about itself."""

import importlib
import json
import re
from pathlib import Path

import pytest

import fastpref
from fastpref import _native

CHECKOUT = Path(__file__).parents[1]


def test_tests_meet_the_installed_package():
    assert CHECKOUT not in Path(fastpref.__file__).parents
    assert _native._core is not None, _native.cpu_missing()


# What users may import; a name that goes, or comes, is a decision.
LOSSES = """
    sigmoid robust hinge ipo exo_pair nca_pair bco_pair sppo_hard sppo aot aot_unpaired apo_zero apo_down discopop
    sigmoid_norm simpo cpo orpo alphapo kto beta_dpo wpo ld_dpo length_dpo dpop dpo_shift mmpo odpo modpo cal_dpo
    rpo rdpo ripo ml_rdpo ddpo mixdpo sft
"""
PUBLIC = {
    "fastpref": """
    BradleyTerryInfo BradleyTerryResult CudaError Edges FusedLMHead Plan PreferenceOutput RPCAInfo RPCAProgress
    RPCAResult SVTResult SequenceLogps SparseCOO TokenStats __version__ bradley_terry build_info curate
    linear_preference_loss linear_token_logps losses plan preference_loss preference_matrix rpca sequence_logps
    set_simd_level svt token_logps
    """,
    "fastpref.curate": """
    AdjustedScores CleanedJudges CleanedScores Coded Consensus CurateConfig CurateResult Diagnosis DropReason
    Exclusion Flag Hygiene ImplicitRewards InputError Kept LearningOrder LengthReport MarginScores MarginSource
    PairLogps PairScores PairSelection Part PromptSelection RepeatedTexts ResponseLogps Route Routes RowProblem
    Samples ScoredSamples SelectionComparison SourceReport TopSelection add_goal all_pairings audit bees
    compare_selections config_from_toml consensus denoise_judges denoise_scores diagnose difficulty
    distributed_order easy_to_hard exclude external_margins goal_records goal_reward goal_rewrite goal_text
    implicit_margins implicit_rewards intersection irm keep_easiest keep_rate learning_order length_report
    loss_diff match_length normalised_margins pair_batches pair_influence pair_logps pair_rows partition
    read_metadata read_samples read_scored_samples remove_length rescale rescale_scores response_logps
    route_by_margin run select_pairs select_prompts select_top split_of supplied text_hashes texts to_logit
    truncated vote_consensus write_pairs
    """,
    "fastpref.losses": f"LOSSES Pairs pair_separable rating_scale {LOSSES}",
    "fastpref.preference_matrix": """
    REASONS CorruptedPairs DenoiseInfo Denoised DenoisedScores JudgeReport NothingToClean Ordering Preferences
    SourceAudit apply_link audit_sources denoise denoise_scores from_comparisons from_scores invert_link order
    """,
    "fastpref.integrations.trl": """
    DataCollatorForRatedPreference FastPrefDPOConfig FastPrefDPOTrainer TRL_LOSSES add_preference_head
    """,
    "fastpref.integrations.ray": "pair_rows",
}
COMMANDS = ["info", "demo", "denoise", "curate"]
OPS = """
    token_logps linear_token_logps preference_loss linear_preference_loss residual_pass outliers batched_verdict
    batched_rpca batched_ialm bradley_terry ialm_pass svt
"""


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
    if module.startswith("fastpref.integrations"):
        host = module.rpartition(".")[2]
        pytest.importorskip(host, reason=f"{host} is not installed (the extra [{host}])")
    face, names = importlib.import_module(module), PUBLIC[module].split()
    assert set(getattr(face, "__all__", names)) == set(names)
    for name in names:
        getattr(face, name)


def test_a_name_that_is_not_there():
    assert set(fastpref.losses.LOSSES) == set(LOSSES.split())
    with pytest.raises(AttributeError, match="module 'fastpref' has no attribute 'nothing'"):
        _ = fastpref.nothing


def test_commands(python):
    done = python("from fastpref.cli.main import main; main(['--help'])", COLUMNS="100")
    assert re.findall(r"^    (\w+)  ", done.stdout, re.MULTILINE) == COMMANDS, done.stderr


def test_a_fresh_process_lists_every_op(python):
    for code in ("import fastpref, json; print(json.dumps(fastpref.build_info()))",
                 "from fastpref.cli.main import main; main(['info', '--json'])"):  # fmt: skip
        done = python(code)
        assert set(json.loads(done.stdout)["backends"]) == set(OPS.split()), done.stderr


def test_curate_and_the_package_itself_do_not_import_torch(python):
    code = "import sys, fastpref, fastpref.curate; fastpref.curate.select_pairs; sys.exit('torch' in sys.modules)"
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_torch_may_be_blocked(python):
    result = python("import sys; sys.modules['torch'] = None; import fastpref.curate; fastpref.CudaError")
    assert result.returncode == 0, result.stderr


def test_the_bare_source_tree_says_how_to_install(python):
    result = python("import fastpref", cwd=CHECKOUT)
    assert result.returncode != 0
    assert "bare source tree" in result.stderr
    assert "pip install ." in result.stderr


def test_build_info():
    info = fastpref.build_info()
    assert info["version"] == fastpref.__version__ == info["native"]["version"]
    backends = info["backends"]["token_logps"]
    assert set(backends) == {"cpu", "cuda"}
    assert backends["cpu"]["native"] == "available"
    assert backends["cpu"]["reference"] == "available"
    step = info["backends"]["preference_loss"]
    assert step["cpu"]["native"] == "available"
    assert (step["cuda"]["native"] == "available") == ("cuda" in info["native"])
    assert "openmp" in info["native"]["threads"] or info["native"]["threads"] == "std::thread"


def test_simd_level_by_environment(python):
    code = "import fastpref; print(fastpref.build_info()['native']['simd'])"
    assert python(code, FASTPREF_SIMD="baseline").stdout.strip() == "baseline"
    wrong = python(code, FASTPREF_SIMD="mmx")
    assert "simd level must be 'auto', 'baseline', 'avx2' or 'avx512', got 'mmx'" in wrong.stderr


def test_without_a_native_core_the_reference_serves_and_says_so(python):
    hide = "import sys; sys.modules['fastpref._core'] = None\n"
    code = hide + (
        "import warnings, torch, fastpref\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    x = torch.randn(2, 4, 9, requires_grad=True)\n"
        "    y = torch.zeros(2, 4, dtype=torch.long)\n"
        "    fastpref.preference_loss(x, y, ref_logits=x.detach()).loss.backward()\n"
        "    fastpref.token_logps(x, y)\n"
        "assert [w.category for w in seen] == [RuntimeWarning], seen\n"
        "assert 'slow reference' in str(seen[0].message)\n"
        "print(fastpref.build_info()['native'])\n"
    )
    result = python(code, TRITON_INTERPRET="0", FASTPREF_EXPECT_NATIVE="0")
    assert result.returncode == 0, result.stderr
    assert "no native core" in result.stdout
    expected = python(hide + "import fastpref; fastpref.build_info()", FASTPREF_EXPECT_NATIVE="1")
    assert expected.returncode != 0

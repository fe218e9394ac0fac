"""The installed package: what it imports, what it is made of, and what it says about itself."""

from pathlib import Path

import pytest

import fastpref
from fastpref import _native

CHECKOUT = Path(__file__).parents[1]


def test_tests_meet_the_installed_package():
    assert CHECKOUT not in Path(fastpref.__file__).parents
    assert _native._core is not None, _native.cpu_missing()


def test_public_names():
    assert set(fastpref.__all__) == {
        "BradleyTerryInfo",
        "BradleyTerryResult",
        "CudaError",
        "Edges",
        "FusedLMHead",
        "Plan",
        "PreferenceOutput",
        "RPCAInfo",
        "RPCAProgress",
        "RPCAResult",
        "SVTResult",
        "SequenceLogps",
        "SparseCOO",
        "TokenStats",
        "__version__",
        "bradley_terry",
        "build_info",
        "curate",
        "linear_preference_loss",
        "linear_token_logps",
        "losses",
        "plan",
        "preference_loss",
        "preference_matrix",
        "rpca",
        "sequence_logps",
        "set_simd_level",
        "svt",
        "token_logps",
    }
    for name in fastpref.__all__:
        getattr(fastpref, name)
    with pytest.raises(AttributeError, match="module 'fastpref' has no attribute 'nothing'"):
        _ = fastpref.nothing


def test_curate_and_the_package_itself_do_not_import_torch(python):
    code = "import sys, fastpref, fastpref.curate; fastpref.curate.select_pairs; sys.exit('torch' in sys.modules)"
    result = python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("first", ["fastpref.token_logps", "fastpref.preference"])
def test_a_submodule_never_hides_the_function_of_its_name(python, first):
    code = f"import {first}, fastpref; assert callable(fastpref.token_logps); fastpref.losses.LOSSES['rdpo']"
    result = python(code)
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
    epilogue = info["backends"]["preference_loss"]
    assert epilogue["cpu"]["native"] == "available"
    assert "torch on vectors" in epilogue["cuda"]["native"]
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

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch

from lightning_privacy.audit import BlindBaseline, Leakage, UserInference, membership_figures
from lightning_privacy.cli import main
from lightning_privacy.cli.audit import Claim, other_data, print_audit, read_claim
from lightning_privacy.errors import ConfigurationError

pytest.importorskip("transformers")


def leakage(shift: float, **more) -> Leakage:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(400, generator=generator, dtype=torch.float64)
    member = torch.arange(400) < 200
    scores[member] += shift
    return Leakage(
        membership=(membership_figures("loss", scores, member),),
        scores={"loss": scores},
        member=member,
        **more,
    )


def claim(ceiling: float, unit: str = "example") -> Claim:
    return Claim(epsilon=1.0, delta=1e-5, unit=unit, steps=9, ceiling=ceiling, generic=0.5)


def test_an_attack_beyond_the_ceiling_refutes_the_claim(capsys):
    assert print_audit(leakage(4.0), claim(0.3), {})
    assert "REFUTED by loss" in capsys.readouterr().out
    assert not print_audit(leakage(4.0), claim(0.999), {})
    assert not print_audit(leakage(0.0), claim(0.1), {"val_loss": 2.0})
    shown = capsys.readouterr().out
    assert "nothing found that ε does not allow" in shown
    assert "Leakage measured [not covered by ε]" in shown


def test_users_refute_a_claim_for_users_only(capsys):
    found = leakage(4.0)
    figures = membership_figures("user inference", found.scores["loss"], found.member)
    users = UserInference(
        figures=figures, scores=found.scores["loss"], member=found.member, fresh=True
    )
    nothing = leakage(0.0, users=users)
    assert not print_audit(nothing, claim(0.5), {})
    shown = capsys.readouterr().out
    assert "user inference" in shown
    assert f"advantage of {nothing.membership[0].advantage:.3f}" in shown
    assert print_audit(nothing, claim(0.5, "user"), {})
    assert "REFUTED by user inference" in capsys.readouterr().out


def test_a_split_that_is_seen_without_the_model_gives_no_verdict(capsys):
    assert not print_audit(leakage(4.0, blind=BlindBaseline(0.9, True)), claim(0.3), {})
    assert "can be told apart without any model" in capsys.readouterr().out


def test_a_run_without_privacy_has_nothing_to_refute(capsys):
    assert not print_audit(leakage(4.0), None, {})
    assert "Without a guarantee" in capsys.readouterr().out


def test_the_command_attacks_a_checkpoint(recipe, folder, capsys):
    words = ["--config", recipe, "--trainer.enable_checkpointing", "true"]
    words += ["--trainer.default_root_dir", str(folder)]
    assert main(["fit", *words]) == 0
    (checkpoint,) = folder.rglob("*.ckpt")
    found = read_claim(checkpoint)
    assert found is not None
    assert found.steps == 2
    assert 0 < found.ceiling < found.generic < 1
    capsys.readouterr()
    assert main(["audit", str(checkpoint), *words, "--rows", "16"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "ratio",
        "min_k_plus_plus",
        "user inference, fresh",
        "exposure of members' secrets",
        "Verdict",
        "val_loss",
    ):
        assert part in shown
    assert f"{found.ceiling:.3f}" in shown
    assert "Caution" not in shown
    assert main(["audit", str(checkpoint), *words, "--data.embedded.n_users", "40"]) == 0
    assert f"the run drew from {found.examples} examples" in capsys.readouterr().out


@pytest.mark.slow
def test_known_noise_is_none(recipe, folder):
    words = ["--config", recipe, "--trainer.enable_checkpointing", "true"]
    words += ["--trainer.default_root_dir", str(folder), "--privacy.test_seed", "5"]
    assert main(["fit", *words]) == 0
    (checkpoint,) = folder.rglob("*.ckpt")
    found = read_claim(checkpoint)
    assert found is not None
    assert math.isinf(found.epsilon)
    assert found.ceiling == 1.0


def test_other_data_than_the_run_had_are_named():
    assert other_data(None, 5) == other_data(claim(0.3), 5) == ""
    known = Claim(**{**asdict(claim(0.3)), "examples": 544})
    assert other_data(known, 544) == ""
    assert "544 examples, and this configuration trains on 312" in other_data(known, 312)


def test_a_configuration_is_asked_for(folder, capsys):
    assert main(["audit", "some.ckpt"]) == 2
    assert "no --config" in capsys.readouterr().err


def test_what_is_no_checkpoint_is_refused(recipe, tmp_path, capsys):
    assert main(["audit", str(tmp_path / "none.ckpt"), "--config", recipe]) == 2
    assert "none.ckpt" in capsys.readouterr().err
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    with pytest.raises(ConfigurationError, match="Lightning's trainer"):
        read_claim(tmp_path / "other.ckpt")
    (tmp_path / "table.ckpt").write_text("id,author,text\n1,ann,hello\n")
    with pytest.raises(ConfigurationError, match=r"UnpicklingError: (?!.*weights_only)"):
        read_claim(tmp_path / "table.ckpt")
    torch.save({"callbacks": {}}, tmp_path / "plain.ckpt")
    assert read_claim(tmp_path / "plain.ckpt") is None

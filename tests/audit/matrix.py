"""The whole audit of the shipped trainer: seeds, modes, ranks, broken trainers, tightness.

    python tests/audit/matrix.py --output docs/benchmarks/audit.md

Some minutes on one core. Exits with 1 if a correct trainer fails or a broken one passes.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lightning_privacy import DifferentialPrivacy
from lightning_privacy.audit import trainer_tightness, verify_trainer
from tests.audit.mutants import MUTANTS, SUBTLE, Mutant
from tests.audit.rank_mutants import RANK_MUTANTS, result_of
from tests.distributed.worlds import Processes

MODES: dict[str, dict[str, Any]] = {
    "flat clipping, micro-batches of 4": {},
    "per-layer clipping": {"clipping": "per_layer"},
    "automatic clipping": {"clipping": "automatic"},
    "low-rank adapters": {"adapters": True},
    "whole draws in one batch": {"physical_batch_size": 64},
    "micro-batches of one row": {"physical_batch_size": 1},
    "users of three rows": {"rows_of_a_user": 3},
    "users of six rows, over two micro-batches": {"rows_of_a_user": 6},
}
RANK_MODES: dict[str, dict[str, Any]] = {
    name: settings
    for name, settings in MODES.items()
    if settings in ({}, {"adapters": True}, {"rows_of_a_user": 6})
}
CLAIMS = {
    "one step, all rows": {"noise_multiplier": 1.0, "steps": 1},
    "20 steps, all rows": {},
    "40 steps, a quarter of the rows": {"noise_multiplier": 2.0, "sample_rate": 0.25, "steps": 40},
}
LEAST_TIGHT = 0.85
PAGE = """\
# The trainer under audit

`verify_trainer` fits a probe through `Trainer(callbacks=[DifferentialPrivacy(...)])` and looks at
what is released: see [Check the promise yourself](../tutorials/check-the-promise.md). This page is
what it says of the trainer of this repository, and of trainers that were broken on purpose. The
part in one process took {seconds:.0f} seconds of one core.

```shell
python tests/audit/matrix.py --output docs/benchmarks/audit.md
```

## The shipped trainer

{checks} checks in each audit.

| mode | seeds | audits that failed |
|---|---|---|
{modes}

## How near the claim an attack comes

An attack with private coordinates that knows the claimed mechanism, against the shipped trainer;
bounds at 95 per cent, δ = 1e-5. A gap is room for a bug that no check looks for.

| release | claimed ε | lower bound | share of the claim | refuted |
|---|---|---|---|---|
{claims}

## Broken trainers

{caught} of {total} were caught, {patches} of them patches to the shipped source.

| what is broken | area | through | caught by |
|---|---|---|---|
{mutants}

## Survivors

{survivors}

These are below the resolution of the audit:

| what is broken | area | through | caught by |
|---|---|---|---|
{subtle}
"""
RANKS = """\
## On two ranks

`verify_trainer(DifferentialPrivacy, devices=2, strategy="private_ddp")`, two processes over gloo on
the CPU; {checks} checks in each audit. It took {seconds:.0f} seconds.

| mode | seeds | audits that failed |
|---|---|---|
{modes}

### Broken on two ranks

{caught} of {total} were caught, all of them patches to the shipped source.

| what is broken | area | caught by |
|---|---|---|
{mutants}
"""
MARK = RANKS.splitlines()[0]


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def audited_mutants(mutants: dict[str, Mutant]) -> Iterator[tuple[bool, str]]:
    for name, mutant in sorted(mutants.items(), key=lambda item: (item[1].area, item[0])):
        with mutant.broken() as audited:
            audit = verify_trainer(audited, stop_at_failure=True, **mutant.options)
        by = audit.failures[0].name if audit.failures else (audit.error or "")
        print("passed" if audit.passed else "caught", name, flush=True)
        yield not audit.passed, row(name, mutant.area, mutant.seam, by or "**nothing**")


def on_two_ranks(seeds: int) -> tuple[str, bool]:
    """Audits of the shipped trainer and of broken ones, in two processes."""
    start, processes = time.monotonic(), Processes()
    modes, failed, checks = [], 0, 0
    for name, settings in RANK_MODES.items():
        repeats = seeds if not settings else 1
        found = [processes.run(result_of, None, {**settings, "seed": s})[0] for s in range(repeats)]
        bad = [text for passed, _, _, text in found if not passed]
        print("\n".join(bad), end="")
        failed, checks = failed + len(bad), found[0][2]
        modes.append(row(name, repeats, len(bad)))
        print(modes[-1], flush=True)
    mutants, caught = [], 0
    for name, mutant in sorted(RANK_MUTANTS.items(), key=lambda item: (item[1].area, item[0])):
        passed, reasons, _, _ = processes.run(result_of, name, {})[0]
        caught += not passed
        mutants.append(row(name, mutant.area, "**nothing**" if passed else reasons[0]))
        print(mutants[-1], flush=True)
    processes.stop()
    text = RANKS.format(
        checks=checks,
        seconds=time.monotonic() - start,
        modes="\n".join(modes),
        caught=caught,
        total=len(mutants),
        mutants="\n".join(mutants),
    )
    return text, not failed and caught == len(mutants)


def in_one_process(seeds: int) -> tuple[str, bool]:
    """The same in this process, and how near the claim an attack comes."""
    start = time.process_time()
    modes, failed, checks = [], 0, 0
    for name, settings in MODES.items():
        repeats = range(seeds if not settings else 3)
        audits = [verify_trainer(DifferentialPrivacy, seed=seed, **settings) for seed in repeats]
        bad = [audit for audit in audits if not audit.passed]
        for audit in bad:
            print(audit)
        failed, checks = failed + len(bad), len(audits[0].checks)
        modes.append(row(name, len(repeats), len(bad)))
        print(modes[-1], flush=True)
    claims, loose = [], 0
    for name, settings in CLAIMS.items():
        found = trainer_tightness(DifferentialPrivacy, **settings)
        share = found.epsilon / found.claimed
        loose += share < LEAST_TIGHT or found.refuted
        refuted = "yes" if found.refuted else "no"
        claims.append(
            row(name, f"{found.claimed:.3f}", f"{found.epsilon:.3f}", f"{share:.0%}", refuted)
        )
        print(claims[-1], flush=True)
    results = list(audited_mutants(MUTANTS))
    subtle = list(audited_mutants(SUBTLE))
    survivors = [text for caught, text in results if not caught]
    text = PAGE.format(
        seconds=time.process_time() - start,
        checks=checks,
        modes="\n".join(modes),
        claims="\n".join(claims),
        caught=len(results) - len(survivors),
        total=len(results),
        patches=sum(mutant.seam == "source" for mutant in MUTANTS.values()),
        mutants="\n".join(line for _, line in results),
        survivors="\n".join(survivors) or "None of the above.",
        subtle="\n".join(line for _, line in subtle),
    )
    return text, not (failed or loose or survivors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="audits of the first mode")
    parser.add_argument("--rank_seeds", type=int, default=5, help="the same on two ranks")
    parser.add_argument("--only", choices=["one", "ranks"], help="keep the rest of the page")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    page = options.output.read_text() if options.only else ""
    one, _, ranks = page.partition(MARK)
    ranks, good = MARK + ranks, []
    # First, because they are forks of this process.
    if options.only != "one":
        ranks, passed = on_two_ranks(options.rank_seeds)
        good.append(passed)
    if options.only != "ranks":
        one, passed = in_one_process(options.seeds)
        good.append(passed)
    text = f"{one.rstrip()}\n\n{ranks}"
    if options.output:
        options.output.write_text(text)
    print(text)
    if not all(good):
        sys.exit(1)


if __name__ == "__main__":
    main()

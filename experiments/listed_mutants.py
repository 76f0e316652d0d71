"""The changes that issue 18 lists as unnoticed, each made anew: which test of the default suite notices it.

Each change replaces one text in a copy of the tree, and the tests that should notice it run there until the first one fails.

    python experiments/listed_mutants.py

``results/listed_mutants.json`` has for each change the file, the two texts and the test that failed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments/results/listed_mutants.json"


class Change(NamedTuple):
    """One change: what it does, where, from what text to what, and the tests that should notice."""

    what: str
    file: str
    old: str
    new: str
    tests: str
    chosen: str = ""


CHANGES = [
    Change(
        "the Jacobian of the guide's density in unconstrained space left out",
        "programs/unconstrained.py", "[self._log_density(site, place, size) for site in guide_sites]",
        "[per_datum(site, log_prob_of(site), self.data, size, self.nesting) for site in guide_sites]", "proposals", "jacobian",
    ),
    Change(
        "a gate's zero times infinity",
        "programs/tracing.py", "return torch.where(factor == 0, 0.0, gradient * factor)", "return gradient * factor",
        "estimators", "infinite_slope",
    ),
    Change(
        "outer masks not applied to what counts as observed",
        "programs/wrappers.py", "torch.as_tensor(joint) & mask if mask is not False else False", "joint",
        "weights", "counts_as_observed",
    ),
    Change(
        "the mask of an analytic KL",
        "programs/log_weights.py", 'scale_and_mask(kl_divergence(site["fn"], prior["fn"]), 1.0, site["mask"])',
        'kl_divergence(site["fn"], prior["fn"])', "weights", "analytic_kl",
    ),
    Change(
        "GDReG without the gradient through the prior's scale",
        "estimators/doubly_reparameterized.py", "return prior.loc + prior.scale * (",
        "return prior.loc + prior.scale.detach() * (",
        "estimators", "gdreg",
    ),
    Change(
        "GDReG gives entries above the diagonal of a scale_tril a gradient",
        "estimators/doubly_reparameterized.py", "prior.scale_tril.tril() @ noise", "prior.scale_tril @ noise",
        "estimators", "gdreg",
    ),
    Change(
        "a mixture's looks not at whole shares of the prior",
        "evidence/planning.py", "checks = [math.ceil(MIN_DRAWS / every) * every]", "checks = [MIN_DRAWS]",
        "marginal", "whole_shares or shapes_of_a_target",
    ),
    Change(
        "stacking without each datum's own maximum",
        "evidence/comparison.py", "stacked = stacked - stacked.max(0)", "stacked = stacked - stacked.max()",
        "evidence", "stacking",
    ),
    Change(
        "the even share of refined modes set to zero",
        "evidence/refine.py", "EVEN_SHARE = 0.1", "EVEN_SHARE = 0.0", "proposals", "found_no_mass",
    ),
    Change(
        "squares dropped in the fit of refined modes",
        "evidence/refine.py", "torch.nan_to_num(coefficient).square()[..., None]", "torch.nan_to_num(coefficient)[..., None]",
        "proposals", "iwae_objective",
    ),
    Change(
        "squares dropped in the fit's step sizes",
        "evidence/refine.py", "second.lerp_(gradient.square(), 0.03)", "second.lerp_(gradient.abs(), 0.03)", "proposals",
    ),
    Change(
        "standard errors of annealing without n/(n-1)",
        "evidence/streaming.py", "np.where(count > 1, count / (count - 1), np.nan)", "np.where(count > 1, 1.0, np.nan)",
        "annealing", "degrees_of_freedom",
    ),
    Change(
        "the sandwich's without the root of n",
        "evidence/bdmc.py", "ddof=1) / math.sqrt(len(self)))", "ddof=1))", "annealing", "sandwich",
    ),
    Change(
        "decomposed means without n",
        "diagnostics/decomposition.py", "np.sqrt(np.sum(values**2)) / len(self)", "np.sqrt(np.sum(values**2))",
        "diagnostics", "standard_error",
    ),
    Change(
        "the gap without the ELBO's part",
        "diagnostics/decomposition.py", "math.hypot(evidence.mean_se, error(self.elbo_se))", "evidence.mean_se",
        "diagnostics", "standard_error",
    ),
    Change(
        "the bias test's null without its trace",
        "diagnostics/gradients.py", ".sum(1) - np.trace(gram)", ".sum(1)", "diagnostics", "formula or false_alarms or bias",
    ),
    Change(
        "active units at 0.1 for 0.01",
        "diagnostics/decomposition.py", "ACTIVE_VARIANCE = 0.01", "ACTIVE_VARIANCE = 0.1", "diagnostics", "active_from",
    ),
    Change(
        "the discretised logistic's scale unclamped",
        "likelihoods.py", "log_scale.clamp(min=-7.0).exp()", "log_scale.exp()", "likelihoods", "minus_seven",
    ),
    Change(
        "a dequantised likelihood that conditions on raw levels",
        "likelihoods.py", "self.inner.given(self._flat(z), x / self.num_levels, mask)",
        "self.inner.given(self._flat(z), x, mask)", "likelihoods", "conditions_on_the_unit_scale",
    ),
    Change(
        "the amortised guides of hierarchies forget the data's scale",
        "models/hierarchical.py", "Sizes(shape, dims, encoder, likelihood.in_scale, up)",
        "Sizes(shape, dims, encoder, 1.0, up)",
        "hierarchical", "unit_size",
    ),
    Change(
        "the semi-supervised label's posterior replaced by its prior",
        "models/conditional.py", "torch.where(y.sum(-1, keepdim=True) > 0, y, torch.softmax(self._log_joint(x, z), -1))",
        "torch.where(y.sum(-1, keepdim=True) > 0, y, torch.softmax(self.label_logits, -1))", "conditional", "average_over",
    ),
    Change(
        "early stopping that restores nothing",
        "training/loop.py", "self.state.tensors.load(self.state.best.values)", "pass",
        "training preflight", "patience or early_stopping",
    ),
    Change(
        "early stopping that restores parameters and no buffers",
        "training/tensors.py", "for name in dict(module.named_buffers()):", "for name in ():",
        "preflight", "early_stopping",
    ),
    Change(
        "clipping that also lengthens short gradients",
        "compile/step.py", "(clip_norm / (norm + 1e-6)).clamp(max=1.0)", "clip_norm / (norm + 1e-6)",
        "staging", "clipping",
    ),
    Change(
        "an infinite gradient norm that updates all the same",
        "compile/step.py", "(torch.isnan(loss) | ~torch.isfinite(norm))", "torch.isnan(loss)", "staging", "infinite",
    ),
    Change(
        "a subsampled plate's comparison of estimators not per datum",
        "programs/inspect.py", "else self.num_data * self.scale) * self.common_scale",
        "else self.num_data) * self.common_scale",
        "diagnostics training", "subsampled",
    ),
    Change(
        "a known label counted as a dimension of the data",
        "models/conditional.py", 'infer={"num_dims": 0}', "infer={}", "conditional", "known_label",
    ),
]  # fmt: skip


def killed_by(change: Change, tree: Path) -> str | None:
    """The test that fails with the change made, or ``None`` where it is not noticed."""
    path = tree / "pyrovae" / change.file
    text = path.read_text()
    if text.count(change.old) < 1:
        raise SystemExit(f"{change.file} has no {change.old!r} any more: say in CHANGES what stands in its place.")
    path.write_text(text.replace(change.old, change.new))
    try:
        files = [f"tests/test_{name}.py" for name in change.tests.split()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *files]
        command += ["-k", change.chosen] if change.chosen else []
        env = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    finally:
        path.write_text(text)
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    if done.returncode not in (0, 1) or bool(failed) != (done.returncode == 1):
        raise SystemExit(f"The tests of {change.what!r} did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed[0] if failed else None


def main() -> None:
    """Make each change and write what noticed it; words as arguments choose some, and write nothing."""
    words = sys.argv[1:]
    began, records = time.time(), []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".git", "__pycache__", "results", "shared", ".*_cache")
        shutil.copytree(ROOT, tree, ignore=ignored, symlinks=True)
        for change in CHANGES:
            if words and not any(word in change.what for word in words):
                continue
            by = killed_by(change, tree)
            records.append({"change": change.what, "file": change.file, "old": change.old, "new": change.new, "by": by})
            print(f"{'survived' if by is None else by}: {change.what}", flush=True)
    if words:
        return
    summary = {
        "date": time.strftime("%Y-%m-%d"), "python": sys.version.split()[0], "torch": torch.__version__,
        "seconds": round(time.time() - began), "changes": len(records),
        "survived": sum(record["by"] is None for record in records), "records": records,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()

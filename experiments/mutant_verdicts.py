"""Why a change that no test notices cannot matter: the verdicts of ``mutants.py``.

Each entry names a file below the package, the line as it is, the expression in it and what stood in its place.
"""

from __future__ import annotations

from typing import Any

VERDICTS: dict[tuple[str, str, str, str], str] = {
    (
        "evidence/latent_quadrature.py",
        "before = integrate(log_f, middle, torch.diag_embed(((high - low) / 1.35).clamp(min=1e-6)), target / 2)",
        "(high - low) / 1.35",
        "high - low",
    ): "where the first cells are finest, in an adaptive rule that two later grids must confirm to the same tolerance",
    (
        "evidence/quadrature.py",
        "from_left = values[..., 1:4] + slope[..., :3].clamp(min=0) * gap[1:]",
        "slope[..., :3].clamp(min=0)",
        "slope[..., :3]",
    ): "equivalent: only a reach above the cell's peak counts, and where the slope is negative neither form is above it",
    (
        "evidence/latent_quadrature.py",
        "return torch.linalg.cholesky(covariance + torch.diag_embed(1e-12 * diagonal + 1e-100))",
        "1e-12",
        "2e-12",
    ): "a regularisation far below the variances, for directions without any",
    (
        "evidence/paths.py",
        "change = min(0.2, max(0.02, 10 / (len(self.betas) - 1)))",
        "1",
        "2",
    ): "how fast step sizes are tuned in the preliminary run, whose chains are discarded",
    (
        "evidence/sampler.py",
        "joint = Probe(*(torch.cat(columns).cpu() for columns in zip(*blocks, strict=True)))",
        "True",
        "False",
    ): "an assertion that lengths agree, as they do",
    (
        "diagnostics/gradients.py",
        "null = ((signs @ gram) * signs).sum(1) - np.trace(gram)",
        "(signs @ gram) * signs",
        "signs @ gram / signs",
    ): "equivalent: the signs are 1 and -1",
    (
        "evidence/refine.py",
        "return usual._replace(num_components=8, num_particles=4) if num_latents <= FEW_LATENTS else usual",
        "4",
        "5",
    ): "draws per step of a fit, a choice between time and noise",
    (
        "programs/log_weights.py",
        "leaves=_leaves(traces, priors, log_prior, layout) if gradients == Gradients.LEAF else (),",
        "_leaves(traces, priors, log_prior, layout) if gradients == Gradients.LEAF else ()",
        "_leaves(traces, priors, log_prior, layout)",
    ): 'only estimators that ask for the gradients "leaf" read the leaves',
    (
        "programs/wrappers.py",
        "joint = mask if joint is True else torch.as_tensor(joint) & mask if mask is not False else False",
        "torch.as_tensor(joint) & mask if mask is not False else False",
        "torch.as_tensor(joint) & mask",
    ): "equivalent: a tensor of False for False",
    (
        "evidence/planning.py",
        "memory = GPU_MEMORY_FRACTION * free_memory(first.device) if on_gpu else USUAL_MEMORY",
        "GPU_MEMORY_FRACTION * free_memory(first.device)",
        "GPU_MEMORY_FRACTION / free_memory(first.device)",
    ): "how large chunks are, on a GPU alone",
    (
        "evidence/quadrature.py",
        "doubt, each = cells.log_bound, len(_NODES) ** centre.shape[-1]",
        "-1",
        "1",
    ): "equivalent: the centre has two dimensions",
    (
        "evidence/refine.py",
        'tqdm(data, total=data.num_batches, desc="refine", unit="batch", disable=not progress) as bar,',
        "not progress",
        "progress",
    ): "whether a progress bar is shown",
    (
        "evidence/sampler.py",
        "if (start // self._plan.group).bit_count() == 1:  # groups 1, 2, 4, ... check the graph on other data",
        "(start // self._plan.group).bit_count() == 1",
        "(start // self._plan.group).bit_count() != 1",
    ): "the line has gone; test_a_value_that_a_graph_froze_is_found_at_the_second_group fails without what took its place",
    (
        "programs/unconstrained.py",
        'return flat if bool(kept.all()) else torch.where(kept, flat, self._draw(num, "prior", True))',
        'flat if bool(kept.all()) else torch.where(kept, flat, self._draw(num, "prior", True))',
        "torch.where(kept, flat, self._draw(num, 'prior', True))",
    ): "equal values: where all draws are kept, the prior's take no place, and cost a run",
    (
        "programs/sites.py",
        "return -min(dims, default=0)",
        "0",
        "1",
    ): "a pair without a plate is refused before",
}


def reason(record: dict[str, Any]) -> str | None:
    """The verdict on a mutant of the result file, where there is one."""
    return VERDICTS.get((record["at"].split(":")[0], record["in"], record["old"], record["new"]))

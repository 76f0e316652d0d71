"""Write docs/papers.md from the files in experiments/results; with ``--check``, exit with 1 if it would change."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).with_name("papers.md")
RESULTS = Path(__file__).parents[1] / "experiments" / "results"

HEAD = """# Papers

Results of papers of this field, computed anew. Each has one script and one committed result, from which `python docs/papers.py`
writes this page. Log p(x) is in nats per image. Where a model trained for less time than the paper's, the section says so. Its
log p(x) is then lower, so compare the differences between rows. A dash stands where the paper states no such number, or
where we did not have it at hand.
"""


class Row(NamedTuple):
    """One number: what it is, what the paper states, and what was measured."""

    what: str
    published: str
    measured: str


class Paper(NamedTuple):
    """One section of the page."""

    title: str
    source: str
    script: str
    said: str
    rows: list[Row]
    budget: str
    picture: str = ""

    def text(self) -> str:
        """The section, as Markdown."""
        rows = "\n".join(f"| {row.what} | {row.published} | {row.measured} |" for row in self.rows)
        picture = f"\n{self.picture}\n" if self.picture else ""
        return (
            f"## {self.title}\n\n{self.source}. {self.said}\n\n| | published | here |\n|---|---|---|\n{rows}\n{picture}\n"
            f"`{self.script}`. {self.budget}\n"
        )


def result(name: str) -> dict[str, Any]:
    """A result file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def cost(found: dict[str, Any], time: str = "") -> str:
    """What a result cost, and where it was computed."""
    spent = f"{found['processor_seconds']:.0f} s of processor time" if "processor_seconds" in found else time
    machine = found["machine"].replace("1 threads", "1 thread")
    return f"Cost: {spent}, {machine}, {found['date']}."


def importance_weighted() -> Paper:
    """Table 1 of Burda et al."""
    trained = result("mnist_estimators")
    elbo, iwae = (trained["rows"][name]["log_px"] for name in ("elbo", "iwae"))
    rows = [
        Row("log p(x), 1 layer, ELBO, 30 epochs", "-86.47, K = 5", f"{elbo:.2f}, K = 8"),
        Row("log p(x), 1 layer, IWAE, 30 epochs", "-85.54, K = 5", f"{iwae:.2f}, K = 8"),
        Row("gain of IWAE, 1 layer, 30 epochs", "+0.93", f"+{iwae - elbo:.2f}"),
    ]
    spent = "**Two layers are not measured yet**: the script is ready."
    if (RESULTS / "importance_weighted_autoencoder.json").exists():
        found = result("importance_weighted_autoencoder")
        for row in found["rows"]:
            rows.append(Row(f"{row['what']}, {found['epochs']} epochs", f"{row['published']:.2f}", f"{row['measured']:.2f}"))
        missing = {(1, 1), (1, 5), (2, 1), (2, 5)} - {(row["layers"], int(row["what"].split()[-1])) for row in found["rows"]}
        words = f" **Not measured yet**: {', '.join(f'{n} layers, K = {k}' for n, k in sorted(missing))}." if missing else ""
        one, two = (next((row["measured"] for row in found["rows"] if row["layers"] == n), None) for n in (1, 2))
        if one is not None and two is not None and two < one:
            words += f" After {found['epochs']} epochs the model of two layers is far from trained, and is behind that of one."
        spent = f"The others: {found['epochs']} epochs, {found['images']:,} images. {cost(found)}{words}"
    return Paper(
        "Importance weighted autoencoders",
        "[Burda, Grosse and Salakhutdinov 2016](https://arxiv.org/abs/1509.00519), table 1, MNIST binarised anew in each epoch",
        "experiments/papers/importance_weighted_autoencoder.py",
        "The importance-weighted bound makes a better model than the ELBO of as many particles, and so does a second layer.",
        rows,
        "**Short of the paper's schedule**, which is 3,280 epochs in batches of 20, and 5,000 samples for each of 10,000 test "
        f"images. The first rows (`experiments/mnist_estimators.py`) are after {trained['epochs']} epochs in batches of "
        f"{trained['batch_size']}, and of 2,000 images. {cost(trained, 'about an hour for seven estimators')} {spent}",
    )


def vamp_prior() -> Paper:
    """The VampPrior against a standard normal."""
    found = result("mnist_parts")
    standard, vamp = (found["priors"][f"{name} prior"]["log_px"] for name in ("standard", "vamp"))
    return Paper(
        "VampPrior",
        "[Tomczak and Welling 2018](https://arxiv.org/abs/1705.07120), MNIST binarised anew in each epoch",
        "experiments/mnist_parts.py",
        "A prior that is a mixture of the guide at 500 learned pseudo-inputs gains over a standard normal.",
        [
            Row("log p(x), standard normal", "-84.45", f"{standard:.2f}"),
            Row("log p(x), VampPrior", "-82.43", f"{vamp:.2f}"),
            Row("gain", "+2.02", f"+{vamp - standard:.2f}"),
        ],
        "**Short of the paper's schedule**: 50 epochs, against up to 2,000; 2,000 test images with 1,000 samples "
        f"each, against 10,000 with 5,000. {cost(found, 'about an hour')}",
    )


def imputation() -> Paper:
    """Imputation with half of the pixels hidden."""
    found = result("mnist_imputation")
    names = {"mean": "mean of each pixel", "single sample": "one draw of the guide", "impute": "`impute`"}
    rows = [Row(f"log p of hidden pixels, {names[name]}", "–", f"{row['log_p']:.2f}") for name, row in found["rows"].items()]
    return Paper(
        "MIWAE: imputation",
        "[Mattei and Frellsen 2019](https://arxiv.org/abs/1812.02633), MNIST with half of the pixels hidden",
        "experiments/mnist_imputation.py",
        "A model trained on incomplete data by the importance-weighted bound of the observed values imputes the others by "
        "self-normalised importance sampling, which is better than one draw of the guide.",
        rows,
        "**Another measure**: the paper's tables have squared errors and accuracies, this is the log-likelihood of the hidden "
        f"pixels. {found['weights']['unreliable']:,} of 2,000 images have too large a Pareto k at {found['samples']:,} draws. "
        f"{cost(found, 'a quarter of an hour')}",
    )


def amortisation() -> Paper:
    """The two parts of the inference gap."""
    found = result("amortisation_gap")
    rows = []
    for row in found["rows"]:
        where = f"{row['images']} images"
        rows += [
            Row(f"log p(x), {where}", "–", f"{row['log p(x)']:.2f} ({row['reliable']} of {found['num_images']} reliable)"),
            Row(
                f"approximation gap, {where}",
                "the smaller" if row["images"] == "training" else "–",
                f"{row['approximation']:.2f} (s.e. {row['approximation_se']:.2f})",
            ),
            Row(
                f"amortisation gap, {where}",
                "the larger" if row["images"] == "training" else "–",
                f"{row['amortisation']:.2f} (s.e. {row['amortisation_se']:.2f})",
            ),
        ]
    return Paper(
        "Inference suboptimality",
        "[Cremer, Li and Duvenaud 2018](https://arxiv.org/abs/1801.03558), MNIST",
        "experiments/papers/amortisation_gap.py",
        "The nats that the bound misses are often those of amortisation, rather than those of the guide's family.",
        rows,
        f"**Short of the paper's schedule**: {found['epochs']} epochs. A guide of the family is fitted to each of "
        f"{found['num_images']} images by {found['steps']} steps. {cost(found)}",
    )


def signal_to_noise() -> Paper:
    """The law of gradients, and the model that DReG trains."""
    found, trained = result("snr_law"), result("mnist_estimators")["rows"]
    rows = [
        Row(f"slope of log SNR in log K: {curve['name']}", f"{curve['law']:+.1f}", f"{curve['slope']:+.3f}")
        for curve in found["curves"]
    ]
    gain = trained["dreg"]["log_px"] - trained["iwae"]["log_px"]
    rows.append(Row("log p(x) of DReG minus that of IWAE, MNIST", "+0.28, K = 5", f"+{gain:.2f}, K = 8"))
    return Paper(
        "DReG and the signal-to-noise ratio",
        "[Rainforth et al. 2018](https://arxiv.org/abs/1802.04537), Gaussian model of 20 dimensions, and "
        "[Tucker et al. 2019](https://arxiv.org/abs/1810.04152)",
        "experiments/snr_law.py",
        "With more particles the guide's gradient of the importance-weighted bound drowns in its noise; the doubly "
        "reparameterised one does not, and trains a better model.",
        rows,
        f"The first three rows are at the paper's size. {cost(found, '8 minutes')} **Short of the schedule**: the last row "
        "(`experiments/mnist_estimators.py`) is after 30 epochs, with the number of a re-implementation beside it "
        "([nbip/IWAE](https://github.com/nbip/IWAE)), since the paper has curves.",
        "![Signal-to-noise ratio of gradients against the number of particles](../experiments/results/snr_law.png)",
    )


def elbo_and_posterior() -> Paper:
    """The identity of the ELBO."""
    found = result("elbo_and_posterior")
    return Paper(
        "ELBO + KL = log p(x)",
        "[Kingma and Welling 2014](https://arxiv.org/abs/1312.6114), equation 1",
        "experiments/papers/elbo_and_posterior.py",
        "The three numbers are computed in three ways: by draws of the guide, on a grid of the two latents, and by quadrature.",
        [Row("largest difference, 12 images", "0", f"{found['largest difference']:.3f}")],
        f"The difference is the sampling error of the ELBO. {cost(found, 'a minute')}",
        "![Exact posteriors of three digits, with the guide's contours](../experiments/results/elbo_and_posterior.png)",
    )


def prior_sampling() -> Paper:
    """Importance sampling from the prior, by dimension."""
    found = result("prior_sampling")
    errors = {(row["dimension"], row["proposal"]): row["mean error"] for row in found["rows"]}
    rows = [
        Row(f"mean error of log p(x) from the {proposal}, {dimension} latents", "–", f"{errors[dimension, proposal]:+.3f}")
        for dimension in (5, 20, 50)
        for proposal in ("prior", "guide")
    ]
    return Paper(
        "The sample size of importance sampling",
        "[Chatterjee and Diaconis 2018](https://arxiv.org/abs/1511.01437)",
        "experiments/papers/prior_sampling.py",
        "About exp(KL(posterior || proposal)) samples are needed. From the prior, 5,000 samples suffice up to 10.6 dimensions "
        "of this linear-Gaussian model.",
        rows,
        cost(found, "a minute"),
        "![Mean error of log p(x), and the part called reliable, by dimension](../experiments/results/prior_sampling.png)",
    )


PAPERS = (
    importance_weighted,
    vamp_prior,
    imputation,
    amortisation,
    signal_to_noise,
    prior_sampling,
    elbo_and_posterior,
)


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(paper().text() for paper in PAPERS)])


if __name__ == "__main__":
    new = page()
    if "--check" in sys.argv:
        old = PAGE.read_text(encoding="utf-8")
        sys.exit("docs/papers.md is not up to date: run python docs/papers.py" if new != old else 0)
    PAGE.write_text(new, encoding="utf-8")

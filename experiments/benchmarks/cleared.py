"""How many particles' gradients are rows of zeros in training, which large products leave out.

Importance weights spread: the coefficients of those that together are below the rounding of the datum's largest are cleared
(``zero_negligible``). The network is 784-200-200-50 with tanh, trained on MNIST by the importance-weighted bound
with 50 particles (Adam at 1e-3, batches of 20, pixels binarised afresh). After so many steps the share is that of 500
training images; beside it, how far clearing moves the bound's gradient over them, in float64, where the rounding of one number
in float32 is 1.2e-7. Then the same of two cells of step.py.

    python experiments/benchmarks/cleared.py --root ../shared/data     # 4 minutes; writes results/cleared.json
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable

import common
import torch
from step import CELLS, start
from torch import Tensor

import pyrovae as pv
from pyrovae.programs.weights import zero_negligible

AT, PARTICLES, BATCH, SEED = (0, 10, 100, 1_000, 3_000, 6_000, 15_000), 50, 20, 0
TIMED = ("tanh-20-k50", "tanh-20-k50-mnist")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="../shared/data", help="the folder that holds MNIST/raw")
    root = parser.parse_args().root
    images = pv.data.load("mnist", root=root, binarize="dynamic").train.flatten(1)
    torch.manual_seed(SEED)

    def batch(number: int) -> Tensor:
        return torch.bernoulli(images[torch.randint(len(images), (number,))])

    vae = pv.make_vae(common.PIXELS, latent_dim=50, hidden=[200, 200], activation="tanh")
    adam = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True)
    step = pv.stage(pv.estimators.IWAE(PARTICLES), vae.model, vae.guide, adam, batch(BATCH))
    found = []
    for number in range(AT[-1] + 1):
        if number in AT:
            precise = copy.deepcopy(vae).double()
            log_w = pv.log_weights(precise.model, precise.guide, batch(500), num_particles=PARTICLES).log_weights
            found.append({"steps": number, **cleared(log_w, precise.parameters())})
            print(found[-1])
        step(batch(BATCH))
    for name in TIMED:
        net, batches = start(CELLS[name], root)
        log_w = net.double().log_weights(torch.cat(batches).double(), PARTICLES)
        found.append({"cell": name, **cleared(log_w, net.parameters())})
        print(found[-1])
    common.write("cleared", {"seed": SEED, "batch": BATCH, "particles": PARTICLES, "found": found})


def cleared(log_w: Tensor, parameters: Iterable[torch.nn.Parameter]) -> dict[str, float]:
    leaves, share = [*parameters], log_w.detach().softmax(0)
    kept = zero_negligible(share.float()) != 0

    def gradient(coefficient: Tensor) -> Tensor:
        slopes = torch.autograd.grad((coefficient * log_w).sum(), leaves, retain_graph=True)
        return torch.cat([slope.flatten() for slope in slopes])

    whole = gradient(share)
    moved = (gradient(share * kept) - whole).norm() / whole.norm()
    return {
        "cleared": round(1 - kept.float().mean().item(), 3),
        "sd_log_weight": round(log_w.detach().std(0).mean().item(), 1),
        "gradient_moved": float(f"{moved.item():.1e}"),
    }


if __name__ == "__main__":
    main()

"""How many particles' gradients are rows of zeros in training, which large products leave out.

Importance weights spread: of those that rounding hides beside the datum's largest the coefficients are cleared
(``pyrovae.weights.without_specks``). The network is 784-200-200-50 with tanh, trained on MNIST by the importance-weighted bound
with 50 particles (Adam at 1e-3, batches of 20, pixels binarised afresh). After so many steps the share is that of 500
training images. Beside it, the share in the cell of step.py whose weights spread.

    python experiments/benchmarks/cleared.py --root ../shared/data     # 3 minutes; writes results/cleared.json
"""

from __future__ import annotations

import argparse

import common
import torch
from common import Network
from step import CELLS, sharpen
from torch import Tensor

import pyrovae as pv
from pyrovae.weights import without_specks

AT, PARTICLES, BATCH, SEED = (0, 10, 100, 1_000, 3_000, 6_000, 15_000), 50, 20, 0
SHARP = "tanh-20-k50-sharp"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="../shared/data", help="the folder that holds MNIST/raw")
    images = pv.data.load("mnist", root=parser.parse_args().root, binarize="dynamic").train.flatten(1)
    torch.manual_seed(SEED)

    def batch(number: int) -> Tensor:
        return torch.bernoulli(images[torch.randint(len(images), (number,))])

    vae = pv.make_vae(common.PIXELS, latent_dim=50, hidden=[200, 200], activation="tanh")
    adam = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True)
    step = pv.stage(pv.estimators.IWAE(PARTICLES), vae.model, vae.guide, adam, batch(BATCH))
    found = []
    for number in range(AT[-1] + 1):
        if number in AT:
            log_w = pv.log_weights(vae.model, vae.guide, batch(500), num_particles=PARTICLES).log_weights
            found.append({"steps": number, **cleared(log_w)})
            print(found[-1])
        step(batch(BATCH))
    torch.manual_seed(SEED)
    net = Network("tanh")
    sharpen(net, CELLS[SHARP])
    cell = cleared(net.log_weights(common.binary_images(500, SEED), PARTICLES))
    common.write("cleared", {"seed": SEED, "batch": BATCH, "particles": PARTICLES, "after": found, SHARP: cell})


@torch.no_grad()
def cleared(log_w: Tensor) -> dict[str, float]:
    share = (without_specks(log_w.softmax(0)) == 0).float().mean()
    return {"cleared": round(share.item(), 3), "sd_log_weight": round(log_w.std(0).mean().item(), 1)}


if __name__ == "__main__":
    main()

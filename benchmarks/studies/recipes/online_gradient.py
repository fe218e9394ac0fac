"""Online DPO's gradient against that of SFT on the chosen response as beta falls (Pan et al., arXiv 2508.18312)."""

import torch

from fastpref import losses, sequence_logps, token_logps
from studies.recipes.task import END, LENGTH, NOTHING, VOCAB, Claim, draw_pool, inputs, train, true_reward

TITLE = "Gradient of online DPO and of SFT on the chosen responses"
PROMPTS, POOL = 16, 8
BETAS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)
SOURCE = "Pan et al. 2025"

CLAIMS = [
    Claim(
        "online DPO's gradient is SFT's at β = 0.01 (cosine above 0.99)",
        SOURCE,
        lambda arms: arms["online β=0.01"],
        above=0.99,
        least=0.0,
        unit="",
    ),
    Claim(
        "the cosine rises as β falls from 1 to 0.01",
        SOURCE,
        lambda arms: arms["online β=0.01"] - arms["online β=1"],
        least=0.01,
        unit="",
    ),
    Claim(
        "only online: with rejected responses of the reference the cosine at β = 0.001 is lower",
        "control",
        lambda arms: arms["online β=0.001"] - arms["offline β=0.001"],
        least=0.01,
        unit="",
    ),
]


def arms(setting) -> dict:
    """Cosines, exact in the expectations: every response of at most two tokens is enumerated."""
    pool = draw_pool(setting, setting.size.scaled(1024), POOL)
    at = torch.as_tensor(pool.reward)
    policy = train(setting, pool.pairs(at.argmax(1), at.argmin(1)))  # away from the reference, as in training
    prompts, responses = pool.prompts[:PROMPTS], every_response()
    count = len(responses)
    repeated = prompts.repeat_interleave(count, 0)
    every = responses.repeat(len(prompts), 1)
    best = true_reward(setting.world, repeated, every).view(len(prompts), count).argmax(1)
    policy.requires_grad_(True)
    states, labels = inputs(repeated, every)[:, :2], every[:, :2]
    logps, ref_logps = (
        sequence_logps(token_logps(p(states), labels), labels).sums.double().view(len(prompts), count)
        for p in (policy, setting.reference)
    )
    chosen, ref_chosen = logps.gather(1, best[:, None]), ref_logps.gather(1, best[:, None])

    def gradient(loss) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.parameters(), retain_graph=True)])

    sft = gradient(-chosen.mean())
    found = {}
    for beta in BETAS:
        pairs = losses.Pairs(*(part.expand_as(logps).flatten() for part in (chosen, logps, ref_chosen, ref_logps)))
        each = losses.sigmoid(pairs, beta=beta).view(len(prompts), count)
        for name, source in (("online", logps), ("offline", ref_logps)):
            share = source.detach().exp()  # of each response among the rejected ones; they sum to 1 per prompt
            dpo = gradient((share * each).sum(1).mean())
            found[f"{name} β={beta:g}"] = float(torch.nn.functional.cosine_similarity(dpo.double(), sft.double(), 0))
    return found


def every_response() -> torch.Tensor:
    """[1 + 15 + 225, LENGTH]: the empty one, one token and the end, and the first two tokens of all others."""
    one = torch.arange(1, VOCAB)
    two = torch.cartesian_prod(one, one)
    ended = torch.stack((one, torch.full_like(one, END)), 1)
    empty = torch.tensor([[END, NOTHING]])
    return torch.nn.functional.pad(torch.cat((empty, ended, two)), (0, LENGTH - 2), value=NOTHING)

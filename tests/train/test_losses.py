"""The learning formulas against loops that spell them out, their gradients, and everything they must refuse."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vsr1.ops.soft_query import gaussian_logp
from vsr1.train.losses import distillation_loss, group_advantages, latent_loss, policy_loss, sft_loss

NAN = float("nan")


def test_advantages_are_standardised_within_each_group():
    rewards = torch.tensor([1.0, 5.0, 3.0, 10.0, 2.0, 20.0])
    groups = torch.tensor([7, 3, 7, 3, 7, 3])
    advantage, varied = group_advantages(rewards, groups, eps=0.01)
    for group in (3, 7):
        own = rewards[groups == group]
        torch.testing.assert_close(advantage[groups == group], (own - own.mean()) / (own.std() + 0.01))
    assert varied.tolist() == [True, True]


def test_modes_and_group_size():
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    assert group_advantages(rewards, 3, mode="mean").advantage.tolist() == [-2, -1, 3, -1, -1, 2]
    leave_one_out = group_advantages(rewards, 3, mode="leave_one_out").advantage
    expected = [rewards[i] - (rewards[i // 3 * 3 : i // 3 * 3 + 3].sum() - rewards[i]) / 2 for i in range(6)]
    torch.testing.assert_close(leave_one_out, torch.stack(expected))


@pytest.mark.parametrize("mode", ["std", "mean", "leave_one_out"])
def test_a_group_without_variance_gets_exactly_zero(mode):
    rewards = torch.tensor([0.9, 0.9, 0.9, 0.0, 1.0, 0.0])  # three times 0.9, divided by three, is not 0.9 in float32
    advantage, varied = group_advantages(rewards, 3, mode=mode, eps=0.0)
    assert advantage[:3].tolist() == [0, 0, 0]
    assert advantage[3:].abs().min() > 0
    assert varied.tolist() == [False, True]


def test_masked_rollouts_change_nothing_and_may_hold_nan():
    rewards, mask = torch.tensor([1.0, NAN, 3.0, 2.0, NAN, NAN]), torch.tensor([1, 0, 1, 1, 0, 0]).bool()
    advantage, varied = group_advantages(rewards, 3, mask=mask)
    pair = group_advantages(torch.tensor([1.0, 3.0]), 2).advantage
    torch.testing.assert_close(advantage, torch.tensor([pair[0], 0, pair[1], 0, 0, 0]))
    assert varied.tolist() == [True, False]  # one roll-out left is no comparison


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"groups": 4}, "4 does not divide 6"),
        ({"groups": torch.zeros(5)}, "groups"),
        ({"mode": "median"}, "median.*leave_one_out"),
        ({"rewards": torch.zeros(2, 3)}, r"\(2, 3\)"),
        ({"rewards": torch.tensor([0, 0, NAN, 0, 0, 0])}, r"reward at \[2\] is nan"),
        ({"mask": torch.zeros(6, dtype=torch.bool)}, "nothing counts"),
    ],
)
def test_bad_rewards_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        group_advantages(**{"rewards": torch.zeros(6), "groups": 3, **arguments})


def batch(seed=0, rows=4, tokens=5):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = -normal(rows, tokens).abs()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]).bool()
    return {
        "logp": (old + 0.4 * normal(rows, tokens)).requires_grad_(),
        "old_logp": old,
        "advantage": torch.tensor([1.0, -0.5, 2.0, NAN], dtype=torch.float64),
        "mask": mask,
        "ref_logp": old + 0.2 * normal(rows, tokens),
        "entropy": normal(rows, tokens).abs().requires_grad_(),
    }


def by_hand(logp, old_logp, advantage, mask, ref_logp, entropy, loss_type, low, high, beta, bonus, max_length):
    """One completion, one token at a time."""
    per_row, tokens = [], []
    for i in range(3):  # the fourth completion has no counted token
        costs, steps = [], [t for t in range(logp.shape[1]) if mask[i, t]]
        row_ratio = torch.stack([logp[i, t] - old_logp[i, t] for t in steps]).mean().exp()
        for t in steps:
            ratio = row_ratio if loss_type == "gspo" else (logp[i, t] - old_logp[i, t]).exp()
            surrogate = torch.minimum(ratio * advantage[i], ratio.clamp(1 - low, 1 + high) * advantage[i])
            gap = ref_logp[i, t] - logp[i, t]
            costs.append(-surrogate + beta * (gap.exp() - gap - 1) - bonus * entropy[i, t])
        per_row.append(torch.stack(costs).mean())
        tokens += costs
    if loss_type in ("grpo", "gspo"):
        return torch.stack(per_row).mean()
    return torch.stack(tokens).sum() / (3 * max_length if loss_type == "dr_grpo" else len(tokens))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo", "gspo"])
@pytest.mark.parametrize(("beta", "bonus"), [(0.0, 0.0), (0.3, 0.0), (0.3, 0.1)])
def test_policy_loss_is_the_formula(loss_type, beta, bonus):
    data = batch()
    leaves = (data["logp"], data["entropy"])
    loss, _ = policy_loss(
        **data, loss_type=loss_type, clip_low=0.1, clip_high=0.3, beta=beta, entropy_bonus=bonus, max_length=9
    )
    truth = by_hand(**data, loss_type=loss_type, low=0.1, high=0.3, beta=beta, bonus=bonus, max_length=9)
    torch.testing.assert_close(loss, truth)
    got = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(got, torch.autograd.grad(truth, leaves, allow_unused=True, materialize_grads=True))


def test_on_policy_gradient_is_the_advantage_times_the_score():
    data = batch()
    logp = data["logp"]
    loss, stats = policy_loss(logp, logp.detach(), data["advantage"], data["mask"], loss_type="bnpo")
    (grad,) = torch.autograd.grad(loss, logp)
    expected = -(data["advantage"][:, None] * data["mask"] / data["mask"].sum()).nan_to_num()
    torch.testing.assert_close(grad, expected)
    assert stats["ratio"] == 1
    assert stats["clip_low"] == stats["clip_high"] == stats["old_kl"] == 0


def test_values_outside_the_mask_do_not_matter():
    data = batch()
    clean, _ = policy_loss(**data, beta=0.1, entropy_bonus=0.1)
    dirty = {k: v.detach().clone() for k, v in data.items()}
    for name in ("logp", "old_logp", "ref_logp", "entropy"):
        dirty[name][~data["mask"]] = NAN
    dirty["old_logp"][0, 4] = -1e9
    dirty["logp"].requires_grad_()
    loss, _ = policy_loss(**dirty, beta=0.1, entropy_bonus=0.1)
    loss.backward()
    torch.testing.assert_close(loss, clean)
    assert torch.isfinite(dirty["logp"].grad).all()


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo", "gspo"])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_a_ratio_beyond_float32_leaves_no_nan(loss_type, advantage):
    """What the old policy held for impossible is clipped or huge, and the gradient of the clipped is 0, not 0 * inf."""
    logp = torch.tensor([[-0.5, -0.5]], requires_grad=True)
    old, mask = torch.tensor([[-1000.0, -0.5]]), torch.ones(1, 2, dtype=torch.bool)
    loss, stats = policy_loss(logp, old, torch.tensor([advantage]), mask, loss_type=loss_type, max_length=2)
    loss.backward()
    assert math.isfinite(loss.item())
    assert torch.isfinite(logp.grad).all()
    if advantage >= 0:
        assert logp.grad[0, 0] == 0
    assert stats["clip_high"] == ((0.5 if loss_type != "gspo" else 1.0) if advantage > 0 else 0)


def test_a_reference_that_is_only_logged_cannot_spoil_the_loss():
    logp, mask = torch.tensor([[-0.5, -0.5]]), torch.ones(1, 2, dtype=torch.bool)
    distant = torch.tensor([[200.0, -0.5]])
    assert policy_loss(logp, logp, torch.ones(1), mask, ref_logp=distant, entropy=distant)[0] == -1


def test_half_precision_is_widened_before_any_exponential():
    generator = torch.Generator().manual_seed(1)
    logp = -torch.rand(8, 64, generator=generator)
    old = logp + 0.1 * torch.randn(8, 64, generator=generator)
    half = [one.bfloat16() for one in (logp, old, torch.randn(8, generator=generator))]
    mask = torch.ones(8, 64, dtype=torch.bool)
    for loss_type in ("grpo", "gspo"):
        found, truth = (
            policy_loss(*three, mask, loss_type=loss_type, entropy=-three[0], entropy_bonus=0.1)
            for three in (half, [one.float() for one in half])
        )
        assert found[0].dtype == torch.float32
        torch.testing.assert_close(found, truth)
    torch.testing.assert_close(sft_loss(half[0], mask), -half[0].float().mean())


def test_rewards_and_vectors_of_half_precision_are_widened():
    generator = torch.Generator().manual_seed(1)
    rewards, advantage = torch.rand(8, generator=generator).bfloat16(), torch.randn(8, generator=generator)
    torch.testing.assert_close(group_advantages(rewards, 4), group_advantages(rewards.float(), 4))
    pair = [torch.randn(8, 4, 16, generator=generator).bfloat16() for _ in range(2)]
    wide = [one.float() for one in pair]
    torch.testing.assert_close(distillation_loss(*pair), distillation_loss(*wide))
    old = gaussian_logp(*wide, 0.5) + 0.1
    torch.testing.assert_close(latent_loss(*pair, old, advantage, 0.5), latent_loss(*wide, old, advantage, 0.5))


class Waits(TorchDispatchMode):
    """Counts what a GPU would be waited for: values read one by one, and shapes that depend on values."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select", "index", "equal", "_unique2")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss_type", ["grpo", "gspo"])
def test_a_gpu_is_not_waited_for_between_the_checks_and_the_numbers(loss_type, monkeypatch):
    transfers = []
    read = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: transfers.append(1) or read(tensor))
    with Waits() as waits:
        policy_loss(**batch(), loss_type=loss_type, beta=0.1, entropy_bonus=0.1)
        mean, action, old, advantage = latents()
        latent_loss(mean, action, old, advantage, 0.1)
    assert (waits.count, len(transfers)) == (0, 4)


def test_advantage_per_token_and_micro_batches():
    data = batch()
    spread = data["advantage"][:, None].expand_as(data["logp"])
    whole, _ = policy_loss(**data, beta=0.1, loss_type="dapo")
    torch.testing.assert_close(policy_loss(**{**data, "advantage": spread}, beta=0.1, loss_type="dapo")[0], whole)
    halves = [{k: v[rows] for k, v in data.items()} for rows in (slice(0, 2), slice(2, 4))]
    for loss_type, count in (("dapo", 9), ("bnpo", 9), ("grpo", 3), ("gspo", 3), ("dr_grpo", 3)):
        settings = {"beta": 0.1, "loss_type": loss_type, "max_length": 6}
        parts = [policy_loss(**half, **settings, denominator=count)[0] for half in halves]
        torch.testing.assert_close(parts[0] + parts[1], policy_loss(**data, **settings)[0])


def test_policy_statistics_count_what_is_clipped():
    old, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    logp = torch.tensor([[0.5, 0.0, -0.5], [0.5, 0.0, -0.5]])
    loss, stats = policy_loss(logp, old, torch.tensor([1.0, -1.0]), mask, ref_logp=old, entropy=torch.full((2, 3), 2.0))
    assert stats["loss"] == pytest.approx(loss.item())
    assert stats["clip_high"] == pytest.approx(1 / 6)
    assert stats["clip_low"] == pytest.approx(1 / 6)
    assert stats["entropy"] == 2
    assert stats["kl"] == pytest.approx((math.exp(-0.5) + 0.5 - 1 + math.exp(0.5) - 0.5 - 1) / 3, rel=1e-5)
    assert stats["old_kl"] == pytest.approx(stats["kl"])
    assert stats["ratio"] == pytest.approx((math.exp(0.5) + 1 + math.exp(-0.5)) / 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loss_type": "ppo"}, "unknown loss_type 'ppo'.*dr_grpo"),
        ({"old_logp": torch.zeros(4, 4)}, r"logp \(4, 5\), old_logp \(4, 4\)"),
        ({"mask": torch.zeros(4, dtype=torch.bool)}, r"mask \(4,\)"),
        ({"advantage": torch.zeros(3)}, r"advantage \(3,\)"),
        ({"advantage": torch.zeros(4, 5), "loss_type": "gspo"}, "one per completion"),
        ({"advantage": torch.tensor([0.0, NAN, 0.0, 0.0])}, r"advantage at \[1, 0\] is nan"),
        ({"advantage": torch.tensor([0.0, NAN, 0.0, 0.0]), "loss_type": "gspo"}, r"advantage at \[1\] is nan"),
        ({"old_logp": torch.full((4, 5), NAN)}, r"old_logp at \[0, 0\] is nan"),
        ({"ref_logp": torch.full((4, 5), -math.inf)}, r"ref_logp at \[0, 0\] is -inf"),
        ({"mask": torch.zeros(4, 5, dtype=torch.bool)}, "nothing counts"),
        ({"beta": 0.1, "ref_logp": None}, "beta=0.1 needs ref_logp"),
        ({"entropy_bonus": 0.1, "entropy": None}, "entropy_bonus=0.1 needs entropy"),
        ({"loss_type": "dr_grpo"}, "max_length"),
        ({"loss_type": "dr_grpo", "max_length": -3}, "-3"),
        ({"denominator": 0.0}, "denominator"),
        ({"clip_low": 1.5}, "1.5"),
        ({"logp": torch.zeros(4)}, r"\(4,\)"),
    ],
)
def test_bad_policy_arguments_are_named(change, says):
    with pytest.raises(ValueError, match=says):
        policy_loss(**{**batch(), **change})


def latents(moved=0.0):
    generator = torch.Generator().manual_seed(4)
    mean = torch.randn(3, 2, 6, generator=generator, dtype=torch.float64)
    action = mean + 0.1 * torch.randn(3, 2, 6, generator=generator, dtype=torch.float64)
    old = gaussian_logp(action, mean, 0.1)
    now = (mean + moved * torch.randn(3, 2, 6, generator=generator, dtype=torch.float64)).requires_grad_()
    return now, action, old, torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def test_latent_loss_is_the_formula():
    mean, action, old, advantage = latents(moved=0.05)
    mask = torch.tensor([[1, 1], [1, 0], [0, 1]]).bool()
    loss, stats = latent_loss(mean, action, old, advantage, 0.1, 0.2, mask)
    costs = []
    for i, k in mask.nonzero().tolist():
        density = torch.distributions.Normal(mean[i, k], 0.1).log_prob(action[i, k]).mean()
        ratio = (density - old[i, k]).exp()
        costs.append(-torch.minimum(ratio * advantage[i], ratio.clamp(0.8, 1.2) * advantage[i]))
    truth = torch.stack(costs).mean()
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(torch.autograd.grad(loss, mean), torch.autograd.grad(truth, mean))
    assert stats["ratio"] != 1


def test_skipped_soft_tokens_may_hold_anything():
    mean, action, old, advantage = latents(moved=0.05)
    mask = torch.tensor([[1, 1], [1, 0], [0, 0]]).bool()
    clean, stats = latent_loss(mean, action, old, advantage, 0.1, 0.2, mask)
    dirty = [one.detach().clone() for one in (mean, action, old)]
    for one in dirty:
        one[~mask] = NAN
    advantage[2] = NAN
    loss, dirty_stats = latent_loss(dirty[0].requires_grad_(), *dirty[1:], advantage, 0.1, 0.2, mask)
    torch.testing.assert_close(loss, clean)
    assert dirty_stats == stats
    expected = torch.autograd.grad(clean, mean)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, dirty[0])[0], expected)
    assert not expected[~mask].any()


def test_latent_gradient_points_from_the_mean_to_rewarded_actions():
    mean, action, old, advantage = latents()
    loss, stats = latent_loss(mean, action, old, advantage, 0.1)
    (grad,) = torch.autograd.grad(loss, mean)
    torch.testing.assert_close(grad, -advantage[:, None, None] * (action - mean) / (0.1**2 * 6 * 6))
    assert stats["ratio"] == 1
    assert 0.5 < stats["distance"] < 1.5


def test_the_noise_teaches_only_because_it_is_used():
    """E[A score] climbs the reward if the reward depends on the action, and only noise if it does not."""
    generator = torch.Generator().manual_seed(5)
    mean = torch.zeros(4000, 1, 2, dtype=torch.float64, requires_grad=True)
    action = 0.3 * torch.randn(4000, 1, 2, generator=generator, dtype=torch.float64)
    slope = torch.tensor([1.0, -2.0], dtype=torch.float64)
    old = gaussian_logp(action, mean, 0.3)

    def climb(reward):
        (grad,) = torch.autograd.grad(latent_loss(mean, action, old, reward, 0.3)[0], mean)
        return -grad.sum(0)[0] * 2

    torch.testing.assert_close(climb(action[:, 0] @ slope), slope, rtol=0.1, atol=0.1)
    unrelated = torch.randn(4000, generator=generator, dtype=torch.float64)
    assert climb(unrelated).abs().max() < 0.25


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mean": torch.zeros(3, 2)}, r"\(3, 2\)"),
        ({"action": torch.zeros(3, 2, 5)}, "action"),
        ({"old_logp": torch.zeros(3)}, "old_logp"),
        ({"advantage": torch.zeros(3, 2)}, "advantage"),
        ({"advantage": torch.tensor([0, NAN, 0])}, r"advantage at \[1\] is nan"),
        ({"old_logp": torch.full((3, 2), math.inf)}, r"old_logp at \[0, 0\] is inf"),
        ({"mask": torch.zeros(3, 2, dtype=torch.bool)}, "nothing counts"),
        ({"sigma": 0.0}, "sigma above 0"),
    ],
)
def test_bad_latent_arguments_are_named(change, says):
    names = ("mean", "action", "old_logp", "advantage")
    with pytest.raises(ValueError, match=says):
        latent_loss(**{**dict(zip(names, latents(), strict=True)), "sigma": 0.1, **change})


def test_sft_loss_is_a_weighted_mean():
    logp = torch.tensor([[-1.0, -2.0, NAN], [-4.0, NAN, NAN]], requires_grad=True)
    weight = torch.tensor([[1.0, 3.0, 0.0], [1.0, 0.0, 0.0]])
    loss = sft_loss(logp, weight)
    assert loss.item() == pytest.approx((1 + 6 + 4) / 5)
    loss.backward()
    torch.testing.assert_close(logp.grad, -weight / 5)


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (torch.zeros(2, 3), "nothing counts"),
        (torch.full((2, 3), -1.0), "at least 0"),
        (torch.full((2, 3), NAN), "weight at"),
        (torch.ones(2, 2), "shapes must agree"),
    ],
)
def test_bad_sft_weights_are_named(weight, says):
    with pytest.raises(ValueError, match=says):
        sft_loss(torch.zeros(2, 3), weight)


def test_distillation_loss_is_scale_free_and_zero_at_the_target():
    target = torch.randn(3, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    assert distillation_loss(target, target).item() == pytest.approx(0, abs=1e-12)
    assert distillation_loss(-target, target).item() == pytest.approx(4 + 2)
    soft = target.roll(1, 0).requires_grad_()
    loss = distillation_loss(soft, target)
    torch.testing.assert_close(distillation_loss(100 * soft, 100 * target), loss)
    cosine = (soft * target).sum(-1) / (soft.norm(dim=-1) * target.norm(dim=-1))
    expected = (soft - target).square().sum() / target.square().sum() + (1 - cosine).mean()
    torch.testing.assert_close(loss, expected)
    target.requires_grad_()
    distillation_loss(soft, target).backward()
    assert target.grad is None
    assert soft.grad.abs().max() > 0


@pytest.mark.parametrize(
    "target", [torch.zeros(1, 2, 3), torch.full((1, 2, 3), NAN), torch.zeros(1, 2, 4), torch.zeros(0, 2, 3)]
)
def test_bad_distillation_targets_are_named(target):
    soft = torch.zeros(0, 2, 3) if not target.numel() else torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="target"):
        distillation_loss(soft, target)

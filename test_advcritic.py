"""The tests, in the order of the paper: each against a closed form, a finite difference in float64, a count from the
paper or an independent recomputation, and at the end the scripts as a user runs them.

    pytest            about two minutes on two cores, no network; MNIST_DIR names MNIST's folder for the tests on it
"""
import copy
import csv
import gzip
import hashlib
import http.server
import math
import os
import pickle
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import eval as evaluation  # eval is a builtin
import train
from advcritic import (GaussianNoise, RunningConfidence, attack, classifier_loss, closest_class, critic, critic_loss,
                       gradient_penalty, lenet, mlp)

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(n, d=6):
    return torch.rand(n, 1, 1, d, dtype=torch.float64)


def linear(d=6, K=4, scale=1.0):
    net = nn.Sequential(nn.Flatten(), nn.Linear(d, K)).double()
    with torch.no_grad():
        net[1].weight.normal_(0, scale)
        net[1].bias.normal_(0, 0.1)
    return net


def smooth(d=6, K=4, hidden=7):
    """A small classifier with second derivatives everywhere, so that finite differences converge."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, K)).double()
    with torch.no_grad():
        for weight in net.parameters():
            weight.normal_(0, 1.0)
    return net


def convolutional():
    """LeNet's kinds of layers, small and in float64, for images (N,1,8,8)."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)).double()
    with torch.no_grad():
        net[-1].weight *= 10  # sure enough of itself for an attack to reach a confidence
    return net


def pick(logits, k):
    return logits[torch.arange(len(k)), k]


def along(grads, direction):
    return sum((g * d).sum().item() for g, d in zip(grads, direction) if g is not None)


def difference(function, weights, direction, h=1e-6):
    """The derivative of function() along a direction in weights, by central differences."""
    values = []
    for sign in (h, -h):
        for scale in (sign, -sign):
            if scale == -sign:
                values.append(function().item())
            with torch.no_grad():
                for weight, d in zip(weights, direction):
                    weight += scale * d
    return (values[0] - values[1]) / (2 * h)


# --- Figure 3: the critic -----------------------------------------------------------------------------------------

def test_critic_is_that_of_figure_3():
    D = critic()
    assert sum(p.numel() for p in D.parameters()) == 2_395_210
    assert [layer.std for layer in D if isinstance(layer, GaussianNoise)] == [0.1, 0.5, 0.5]
    assert [layer.negative_slope for layer in D if isinstance(layer, nn.LeakyReLU)] == [0.2, 0.2]
    x = torch.rand(3, 1, 28, 28)
    assert D(x).shape == (3, 10) and not torch.equal(D(x), D(x))
    D.eval()
    assert torch.equal(D(x), D(x))


def test_noise_has_its_standard_deviation():
    noise = GaussianNoise(0.5)(torch.full((200_000,), 3.0)) - 3
    assert abs(noise.mean()) < 0.005 and abs(noise.std() - 0.5) < 0.005


# --- Eq. 4 --------------------------------------------------------------------------------------------------------

def test_gradient_penalty_of_a_linear_score():
    x = images(5).requires_grad_()
    w = torch.tensor([3.0, 0, 4, 0, 0, 0], dtype=torch.float64)  # |w| = 5 at every x
    assert gradient_penalty(x.flatten(1) @ w, x).item() == pytest.approx(16)
    assert gradient_penalty((x * 0).sum((1, 2, 3)), x).item() == pytest.approx(1, rel=1e-5)  # no NaN at a zero gradient


def test_gradient_penalty_reaches_the_weights():
    D, x, y = smooth(), images(5).requires_grad_(), torch.tensor([0, 1, 2, 3, 0])
    weights = list(D.parameters())
    direction = [torch.randn_like(weight) for weight in weights]
    grads = torch.autograd.grad(gradient_penalty(pick(D(x), y), x), weights, allow_unused=True)
    by_difference = difference(lambda: gradient_penalty(pick(D(x), y), x), weights, direction)
    assert along(grads, direction) == pytest.approx(by_difference, rel=1e-6)


def test_critic_loss_by_hand():
    D = linear(K=3)
    with torch.no_grad():
        D[1].weight.zero_(), D[1].bias.copy_(torch.tensor([2.0, -1.0, 0.5]))
    x, y, y_adv = images(2), torch.tensor([0, 1]), torch.tensor([2, 0])
    real = (math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2  # -log sigmoid(D_y)
    fake = (math.log1p(math.exp(0.5)) + math.log1p(math.exp(2))) / 2  # -log(1 - sigmoid(D_k))
    assert critic_loss(D, x, y, x, y_adv, lambda_grad=0).item() == pytest.approx(real + fake)
    assert critic_loss(D, x, y, x, y_adv).item() == pytest.approx(real + fake + 10 * (1 + 1), rel=1e-5)


def test_critic_loss_with_a_linear_critic():
    D, x, x_adv = linear(), images(3), images(3)
    y, k = torch.tensor([0, 1, 2]), torch.tensor([3, 3, 1])
    W = D[1].weight.detach()
    penalty = sum((W[c].norm(dim=1) - 1).square().mean() for c in (y, k))
    loss = F.softplus(-pick(D(x), y)).mean() + F.softplus(pick(D(x_adv), k)).mean() + 7 * penalty
    assert critic_loss(D, x, y, x_adv, k, lambda_grad=7).item() == pytest.approx(loss.item())


def test_critic_loss_uses_one_noise_draw_for_logit_and_penalty():
    calls = []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = critic()

        def forward(self, x):
            calls.append(len(x))
            return self.net(x)

    x, y = torch.rand(4, 1, 28, 28), torch.tensor([0, 1, 2, 3])
    critic_loss(Counting(), x, y, x, y).backward()
    assert calls == [4, 4]


# --- Eq. 5 and Eq. 6 ----------------------------------------------------------------------------------------------

def test_classifier_loss_recomputed():
    f, D, x = smooth(), smooth(), images(8)
    label = f(x).argmax(1)
    y, target = (label + torch.arange(8) % 2) % 4, closest_class(f, x, label)
    x_adv = attack(f, x, target, 0.9, create_graph=True)
    loss, parts = classifier_loss(f, D, x, y, x_adv, lam=0.3, lambda_rec=0.02)
    k = f(x_adv).argmax(1)
    nll = -pick(f(x).log_softmax(1), y).mean()
    fool, cycle, moved = [], [], [i for i in range(8) if k[i] != label[i]]
    assert moved  # otherwise this test shows nothing
    for i in moved:  # image by image
        fool.append(-torch.sigmoid(D(x_adv[i:i + 1])[0, k[i]]).log())
        x_rec = attack(f, x_adv[i:i + 1].detach(), label[i:i + 1], f(x[i:i + 1]).softmax(1).max().item())
        cycle.append((x_rec - x[i]).square().sum())
    fool, cycle = sum(fool) / len(fool), sum(cycle) / len(cycle)
    assert parts["nll"].item() == pytest.approx(nll.item())
    assert parts["fool"].item() == pytest.approx(fool.item())
    assert parts["cycle"].item() == pytest.approx(cycle.item())
    assert parts["success"].item() == len(moved) / 8
    assert loss.item() == pytest.approx((nll + 0.3 * fool + 0.02 * cycle).item())


def test_no_attack_succeeds_then_no_terms():
    f, D, x, y = smooth(), smooth(), images(5), torch.tensor([0, 1, 2, 3, 0])
    x_adv = attack(f, x, f(x).argmax(1), 1e-6, create_graph=True)  # reached from the start: x_adv = x
    loss, parts = classifier_loss(f, D, x, y, x_adv, lam=0.5)
    assert (parts["fool"], parts["cycle"], parts["success"]) == (0, 0, 0)
    assert loss.item() == parts["nll"].item()
    loss.backward(inputs=list(f.parameters()))
    expected = torch.autograd.grad(F.cross_entropy(f(x), y), list(f.parameters()))
    for weight, g in zip(f.parameters(), expected):
        assert torch.allclose(weight.grad, g)


@pytest.mark.parametrize("player", ["critic", "classifier"])
def test_each_players_step_reaches_only_it(player):
    settings = dict(arch="lenet", defense="critic", seed=0, lam=0.1, lambda_rec=0.01, lambda_grad=10.0, attack_steps=2,
                    target="closest", epochs=1)
    run = train.start(settings, "cpu")
    frozen, moving = (run.f, run.adam_D) if player == "critic" else (run.D, run.adam_f)
    other = run.adam_f if player == "critic" else run.adam_D
    other.step = lambda: None  # the other player does not move: what then changed, this one's step changed
    before = copy.deepcopy(frozen.state_dict())
    train.critic_step(run, torch.rand(4, 1, 28, 28), torch.tensor([1, 2, 3, 4]))
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert all(moving.state[weight]["exp_avg"].abs().sum() > 0 for group in moving.param_groups
               for weight in group["params"])


def test_minimise_gives_no_gradient_to_the_other_player():
    f, D = linear(), linear()
    train.minimise(D(images(3)).sum() * f(images(3)).sum(), f, torch.optim.SGD(f.parameters(), lr=0.1))
    assert all(weight.grad is None for weight in D.parameters())
    assert all(weight.grad is not None for weight in f.parameters())


# --- Eq. 7 and Algorithm 1 ----------------------------------------------------------------------------------------

def test_one_step_of_equation_7_by_hand():
    f = linear(d=2, K=2)
    W, b = torch.tensor([[1.0, 2.0], [-1.0, 1.0]]).double(), torch.tensor([0.5, -0.5]).double()
    with torch.no_grad():
        f[1].weight.copy_(W), f[1].bias.copy_(b)
    x, C = torch.tensor([0.3, 0.2]).double(), 0.9
    z0, z1 = 0.3 + 0.4 + 0.5, -0.3 + 0.2 - 0.5  # the two logits
    p = math.exp(z1) / (math.exp(z0) + math.exp(z1))
    w = [(1 - p) * (-1 - 1), (1 - p) * (1 - 2)]  # grad log p_1 = (1 - p_1)(W_1 - W_0)
    n = math.hypot(*w)
    length = (math.log(C) - math.log(p)) / n
    expected = [0.3 + 1.05 * length * w[0] / n, 0.2 + 1.05 * length * w[1] / n]
    x_adv = attack(f, x.view(1, 1, 1, 2), torch.tensor([1]), C, steps=1)
    assert x_adv.flatten().tolist() == pytest.approx(expected, rel=1e-3)  # eps = 1e-8 moves it by 1e-4 |r|


def test_attack_on_two_linear_classes_ends_at_the_confidence():
    """With two linear classes p_1 = C on a hyperplane, |log(C/(1-C)) - (z_1 - z_0)| / |w_1 - w_0| away from x."""
    f, x, C = linear(K=2), images(20), 0.9
    target = 1 - f(x).argmax(1)
    z = pick(f(x), target) - pick(f(x), 1 - target)
    normal = (f[1].weight[0] - f[1].weight[1]).norm()
    expected = (math.log(C / (1 - C)) - z) / normal
    x_adv = attack(f, x, target, C, steps=500, overshoot=0.0, max_step=0.01)
    assert torch.allclose((x_adv - x).flatten(1).norm(dim=1), expected, atol=0.011)
    assert (pick(f(x_adv).softmax(1), target) >= C).all()
    assert torch.allclose((x_adv - x).flatten(1) @ (f[1].weight[0] - f[1].weight[1]),
                          (2.0 * (target == 0) - 1) * normal * (x_adv - x).flatten(1).norm(dim=1))  # along the normal


def surrogate(f, x, target, C, steps, overshoot):
    """x_adv as Algorithm 1 lets the gradient see it, by another route than attack's: at the points x_i, found once and
    then held fixed, f's weights enter through w and log p, and each indicator is its value plus the change of the
    sigmoid since. Returns a function of the present weights of f, and the indicators' values."""
    def step(x_i):
        x_i = x_i.clone().requires_grad_()
        log_p = pick(f(x_i).log_softmax(1), target)
        w, = torch.autograd.grad(log_p.sum(), x_i, create_graph=True)
        norm = (w.flatten(1).pow(2).sum(1) + 1e-8).sqrt().view(-1, 1, 1, 1)
        distance = (C.log() - log_p).abs().view(-1, 1, 1, 1)
        return (1e-4 + distance / norm) * w / norm, torch.sigmoid(C - log_p.exp()), log_p.exp() < C

    points, sigmoids, indicators, r, go = [], [], [], torch.zeros_like(x), torch.ones(len(x)).double()
    for _ in range(steps):
        points.append((x + (1 + overshoot) * r).detach())
        r_i, sigmoid, indicator = step(points[-1])
        sigmoids.append(sigmoid.detach()), indicators.append(indicator.double())
        go = go * indicators[-1]
        r = (r + go.view(-1, 1, 1, 1) * r_i).detach()

    def x_adv():
        r, go = torch.zeros_like(x), torch.ones(len(x)).double()
        for x_i, sigmoid_0, indicator_0 in zip(points, sigmoids, indicators):
            r_i, sigmoid, _ = step(x_i)
            go = go * (indicator_0 + sigmoid - sigmoid_0)
            r = r + go.view(-1, 1, 1, 1) * r_i
        return x + (1 + overshoot) * r

    return x_adv, torch.stack(indicators)


def test_gradient_of_the_attack_with_respect_to_the_weights():
    f, x = smooth(), images(12)
    target, steps = closest_class(f, x, f(x).argmax(1)), 4
    C = torch.linspace(0.5, 0.97, 12).double()
    C[::3] = 1.0  # never reached: these images run all steps
    v = torch.randn_like(x)
    pretended, indicators = surrogate(f, x, target, C, steps, 0.05)
    reached = (indicators.prod(0) == 0)
    assert reached.any() and not reached.all()  # both kinds are there
    x_adv = attack(f, x, target, C, steps, 0.05, create_graph=True)
    assert torch.allclose(x_adv, pretended(), atol=1e-12)
    weights = list(f.parameters())
    grads = torch.autograd.grad((x_adv * v).sum(), weights)
    for _ in range(3):
        direction = [torch.randn_like(weight) for weight in weights]
        by_difference = difference(lambda: (pretended() * v).sum(), weights, direction)
        assert along(grads, direction) == pytest.approx(by_difference, rel=1e-6)


def test_gradient_of_the_attack_with_respect_to_the_confidence():
    f, x = smooth(), images(4)
    target = closest_class(f, x, f(x).argmax(1))
    C = torch.full((4,), 0.99).double().requires_grad_()
    x_adv = attack(f, x, target, C, steps=1, create_graph=True)
    grad, = torch.autograd.grad((x_adv - x).square().sum(), C)
    # One step from p < C: r = (1e-4 + (log C - l)/n) w/n times the indicator, whose derivative is sigmoid'(C - p)
    p = pick(f(x).softmax(1), target).detach()
    r = (x_adv - x).detach().flatten(1).norm(dim=1)
    x_i = x.clone().requires_grad_()
    w, = torch.autograd.grad(pick(f(x_i).log_softmax(1), target).sum(), x_i)
    norm = w.flatten(1).norm(dim=1)
    s = torch.sigmoid(C.detach() - p)
    expected = 2 * r * (1.05 / (C.detach() * norm) + s * (1 - s) * r)
    assert torch.allclose(grad, expected, rtol=1e-4)


def test_the_indicator_carries_gradient():
    """An image already at its confidence does not move, so any gradient it has comes through the estimator."""
    f, x = smooth(), images(3)
    C = 0.5 * f(x).softmax(1).amax(1).detach()
    x_adv = attack(f, x, f(x).argmax(1), C, steps=1, create_graph=True)
    assert torch.equal(x_adv, x)
    grads = torch.autograd.grad(x_adv.square().sum(), list(f.parameters()))
    assert sum(g.abs().sum() for g in grads) > 1e-3


def test_the_point_of_a_step_is_a_constant():
    """The gradient of two steps is the sum of that of each, the second taken from the first's end as a constant."""
    f, x = smooth(), images(5)
    target, C, weights = closest_class(f, x, f(x).argmax(1)), 1.0, list(f.parameters())
    both = torch.autograd.grad(attack(f, x, target, C, steps=2, create_graph=True).sum(), weights)
    x_1 = attack(f, x, target, C, steps=1, create_graph=True)
    x_2 = attack(f, x_1.detach(), target, C, steps=1, create_graph=True)
    # The second step is also weighted by the first indicator: its estimator's gradient times the second step.
    p = pick(f(x).softmax(1), target)
    s = torch.sigmoid(C - p)
    estimator = ((s - s.detach()) * (x_2 - x_1).detach().flatten(1).sum(1)).sum()
    one_by_one = torch.autograd.grad(x_1.sum() + x_2.sum() + estimator, weights)
    for a, b in zip(both, one_by_one):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_attack_without_graph_has_the_same_values():
    f, x = convolutional(), torch.rand(6, 1, 8, 8).double()
    target = closest_class(f, x, f(x).argmax(1))
    with_graph = attack(f, x, target, 0.9, create_graph=True)
    without = attack(f, x, target, torch.full((6,), 0.9, dtype=torch.float64).requires_grad_())
    assert with_graph.requires_grad and not without.requires_grad
    assert torch.allclose(with_graph, without, rtol=0, atol=1e-12)


def test_attack_stops_at_the_confidence_and_keeps_a_failed_iterate():
    f, x = smooth(), images(10)
    target = closest_class(f, x, f(x).argmax(1))
    start = pick(f(x).softmax(1), target)
    assert torch.equal(attack(f, x, target, (start * 0.9).detach()), x)
    assert not torch.equal(attack(f, x, target, 1.0, steps=1), x)
    assert torch.equal(attack(f, x, target, 0.9, steps=0), x)


def test_attack_in_the_box():
    f, x = convolutional(), torch.rand(30, 1, 8, 8).double().round()  # every pixel at an end of the box
    target = closest_class(f, x, f(x).argmax(1))
    x_adv = attack(f, x, target, 0.6, steps=500, overshoot=0.02, max_step=0.1, box=(0, 1))
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert (f(x_adv).argmax(1) == target).all() and (pick(f(x_adv).softmax(1), target) >= 0.6).all()
    # C = 0.01 is reached at once, but with a box the attack goes on until the target is also the predicted class.
    assert (f(attack(f, x, target, 0.01, steps=500, max_step=0.1, box=(0, 1))).argmax(1) == target).all()
    short = attack(f, x, target, 0.99, steps=3, overshoot=0.02, max_step=0.1, box=(0, 1))
    assert (short - x).flatten(1).norm(dim=1).max() <= 3 * 1.02 * 0.1 + 1e-9


# --- The target and the confidence --------------------------------------------------------------------------------

def test_closest_class_of_a_linear_model():
    f, x = linear(K=5), images(40)
    label = f(x).argmax(1)
    W, z = f[1].weight.detach(), f(x).detach()
    for i in range(40):
        distance = {k: ((z[i, k] - z[i, label[i]]).abs() / (W[k] - W[label[i]]).norm()).item()
                    for k in range(5) if k != label[i]}
        assert closest_class(f, x[i:i + 1], label[i:i + 1]).item() == min(distance, key=distance.get)
    assert len(set(closest_class(f, x, label).tolist())) > 1


def test_running_confidence_by_hand():
    confidence = RunningConfidence(3)
    assert confidence.mean.tolist() == [1, 1, 1]
    probability = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    confidence.update(probability.log())
    assert confidence.mean.tolist() == pytest.approx([0.5 + 0.5 * 0.7, 0.5 + 0.5 * 0.5, 1])
    confidence.update(probability[:1].log())
    assert confidence.mean.tolist() == pytest.approx([0.5 * 0.85 + 0.5 * 0.8, 0.75, 1])
    assert not confidence.mean.requires_grad and "mean" in confidence.state_dict()


# --- Section 5: networks, schedule, evaluation --------------------------------------------------------------------

def test_parameter_counts():
    assert sum(p.numel() for p in mlp().parameters()) == 3_836_410
    assert sum(p.numel() for p in lenet().parameters()) == 582_026
    x = torch.rand(2, 1, 28, 28)
    assert mlp()(x).shape == lenet()(x).shape == (2, 10)


def test_he_initialisation():
    for net in (mlp(), lenet(), critic()):
        for layer in net:
            if hasattr(layer, "weight"):
                fan_in = layer.weight[0].numel()
                assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.1)
                assert layer.bias.abs().max() == 0


def test_learning_rate_schedule():
    factor = [train.learning_rate_factor("critic", epoch, 100) for epoch in (0, 1, 40, 41, 80, 81, 100)]
    assert factor == [1, 1, 1, 0.5, 0.5, 0.25, 0.25]
    assert [train.learning_rate_factor("reference", epoch, 100) for epoch in (1, 2, 3)] == [1, 0.95, 0.95 ** 2]


def test_rho():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]]).view(3, 1, 1, 2)
    r = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]).view(3, 1, 1, 2)
    ratio = evaluation.rho(x, x + r)
    assert ratio[0].item() == pytest.approx(0.2) and ratio[1].isnan() and ratio[2] == 0


def test_deepfool_on_a_linear_model():
    f, x = linear(K=3, scale=0.3), 0.5 + 0.1 * (images(20) - 0.5)  # far from the box
    y = f(x).argmax(1)
    W, z = f[1].weight.detach(), f(x).detach()
    closest = torch.stack([torch.stack([(z[i, k] - z[i, y[i]]).abs() / (W[k] - W[y[i]]).norm()
                                        for k in range(3) if k != y[i]]).min() for i in range(20)])
    kept = closest < 0.4  # beyond it the box may be in the way
    assert kept.sum() > 5
    for max_step in (None, 0.1):
        x_adv = evaluation.deepfool(f, x, y, max_step=max_step)
        length = (x_adv - x).flatten(1).norm(dim=1)
        assert (f(x_adv).argmax(1) != y)[kept].all()
        assert (length[kept] >= closest[kept]).all()
        assert torch.allclose(length[kept], closest[kept] * 1.02, atol=1.1e-3)
    long = closest > 0.1
    assert torch.allclose((evaluation.deepfool(f, x, y, steps=500, max_step=0.01) - x).flatten(1).norm(dim=1)[kept & long],
                          closest[kept & long], atol=0.012)


def test_deepfool_leaves_wrong_and_unbeatable_images_alone():
    f, x = linear(), images(6)
    y = f(x).argmax(1)
    assert torch.equal(evaluation.deepfool(f, x, (y + 1) % 4), x)          # f is wrong already
    assert torch.equal(evaluation.deepfool(f, x, y, steps=0), x)           # no steps, no success

    def constant(x):  # no perturbation changes its mind
        return x.flatten(1)[:, :4] * 0 + torch.tensor([1.0, 0, 0, 0]).double()
    assert torch.equal(evaluation.deepfool(constant, x, torch.zeros(6).long(), steps=5), x)


def test_own_protocol():
    f, x = convolutional(), torch.rand(20, 1, 8, 8).double()
    sure, y = f(x).softmax(1).max(1)
    x_adv = evaluation.own(f, x, y)
    target = closest_class(f, x, y)
    moved = (x_adv != x).flatten(1).any(1)
    assert moved.any() and (f(x_adv).argmax(1) == target)[moved].all()
    assert torch.equal(evaluation.own(f, x, (y + 1) % 5), x)
    figures = evaluation.measure(f, x, y, evaluation.own)
    assert figures["reached"] == pytest.approx(((f(x_adv).softmax(1).amax(1) >= sure) & moved).double().mean().item())
    assert figures["failed"] == (~moved).sum() and figures["black"] == 0


def test_measure_counts_failures_black_and_wrong_images():
    f, x = linear(d=6, K=4), images(6)
    x[5] = 0
    y = f(x).argmax(1)
    y[0] = (y[0] + 1) % 4  # f is wrong here: counts 0

    def known(f, x, y):  # fools f at 1 and 2 by moving towards another class, fails at 3, 4 and 5
        x_adv = x.clone()
        for i in (1, 2):
            k = (y[i] + 1) % 4
            x_adv[i] = x[i] + 100 * (f[1].weight[k] - f[1].weight[y[i]]).view(1, 1, 6)
        return x_adv
    x_adv = known(f, x, y).detach()
    assert (f(x_adv).argmax(1) != y).tolist()[:3] == [True, True, True]
    figures = evaluation.measure(f, x, y, lambda f, x, y: known(f, x, y).detach())
    assert figures["rho"] == pytest.approx(evaluation.rho(x, x_adv)[:3].mean().item())
    assert (figures["failed"], figures["black"]) == (3, 1)
    assert evaluation.error_rate(f, x, y) == pytest.approx(1 / 6)


# --- What holds for every attack ----------------------------------------------------------------------------------

def train_attack(f, x, y):
    return attack(f, x, closest_class(f, x, y), 0.9)


def box_attack(f, x, y):
    return attack(f, x, closest_class(f, x, y), 0.9, steps=200, overshoot=0.02, max_step=0.1, box=(0, 1))


EVERY_ATTACK = [train_attack, box_attack, evaluation.deepfool, evaluation.own]


@pytest.mark.parametrize("method", EVERY_ATTACK)
def test_batch_of_eight_equals_eight_batches_of_one(method):
    f, x = convolutional(), torch.rand(8, 1, 8, 8).double()
    y = f(x).argmax(1)
    one_by_one = torch.cat([method(f, x[i:i + 1], y[i:i + 1]) for i in range(8)])
    assert torch.allclose(method(f, x, y), one_by_one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", EVERY_ATTACK)
def test_no_side_effects(method):
    f, x = nn.Sequential(convolutional(), nn.Dropout(0.0)).train(), torch.rand(4, 1, 8, 8).double()
    y = f(x).argmax(1)
    f[0][0].requires_grad_(False)
    x_before, before = x.clone(), copy.deepcopy(f.state_dict())
    x_adv = method(f, x, y)
    assert not x_adv.requires_grad and x_adv.grad_fn is None and x_adv.dtype == x.dtype
    assert torch.equal(x, x_before) and not x.requires_grad and x.grad is None
    assert all(torch.equal(value, before[name]) for name, value in f.state_dict().items())
    assert all(weight.grad is None for weight in f.parameters()) and f.training
    assert [weight.requires_grad for weight in f.parameters()] == [False, False, True, True]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("method", EVERY_ATTACK)
def test_under_no_grad_and_on_an_empty_batch(method):
    f, x = convolutional(), torch.rand(4, 1, 8, 8).double()
    y = f(x).argmax(1)
    with torch.no_grad():
        assert torch.equal(method(f, x, y), method(f, x, y))
    assert not torch.equal(method(f, x, y), x)
    assert method(f, x[:0], y[:0]).shape == (0, 1, 8, 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method", EVERY_ATTACK)
def test_attacks_follow_the_device(method):
    f, x = convolutional().cuda(), torch.rand(4, 1, 8, 8).double().cuda()
    y = f(x).argmax(1)
    x_adv = method(f, x, y)
    assert x_adv.is_cuda and torch.allclose(x_adv.cpu(), method(f.cpu(), x.cpu(), y.cpu()), atol=1e-6)


# --- Data ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def mnist_dir():
    folder = os.environ.get("MNIST_DIR")
    if not folder:
        pytest.skip("MNIST_DIR is not set: it names the folder of MNIST's four files")
    return Path(folder)


def test_mnist_is_mnist(mnist_dir):
    x_train, y_train, x_test, y_test = data.load_mnist(mnist_dir)
    assert x_train.shape == (60000, 1, 28, 28) and x_test.shape == (10000, 1, 28, 28)
    assert x_train.dtype == torch.float32 and y_train.dtype == torch.int64
    assert x_train.min() == 0 and x_train.max() == 1 and x_train.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert y_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4] and y_test[:5].tolist() == [7, 2, 1, 0, 4]
    assert torch.bincount(y_train).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]


def idx(values):
    """A small IDX file of bytes."""
    return struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape) + bytes(values.flatten().tolist())


@pytest.fixture
def small(monkeypatch):
    """Four small files in place of MNIST's, with their true checksums: name -> bytes."""
    tensors = [torch.randint(256, (6, 4, 4)), torch.randint(10, (6,)), torch.randint(256, (3, 4, 4)), torch.randint(10, (3,))]
    files = {name: idx(values) for (name, _, _), values in zip(data.FILES, tensors)}
    monkeypatch.setattr(data, "FILES", tuple((name, tuple(values.shape), hashlib.sha256(files[name]).hexdigest())
                                             for (name, _, _), values in zip(data.FILES, tensors)))
    return files, tensors


@pytest.mark.parametrize("where, ending", [("", ""), ("", ".gz"), ("MNIST/raw", ""), ("MNIST/raw", ".gz")])
def test_files_are_found_and_parsed(small, tmp_path, where, ending):
    files, tensors = small
    (tmp_path / where).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (tmp_path / where / (name + ending)).write_bytes(gzip.compress(content) if ending else content)
    x_train, y_train, x_test, y_test = data.load_mnist(tmp_path, mirrors=())
    assert torch.equal(x_train[:, 0], tensors[0] / 255) and torch.equal(y_train, tensors[1])
    assert torch.equal(x_test[:, 0], tensors[2] / 255) and torch.equal(y_test, tensors[3])


BROKEN = {
    "truncated": (lambda c: c[:-5], "bytes, expected"),
    "lengthened": (lambda c: c + b"x", "more than"),
    "one bit flipped": (lambda c: c[:-1] + bytes([c[-1] ^ 1]), "SHA-256"),
    "empty": (lambda c: b"", "neither gzip nor IDX"),
    "header truncated": (lambda c: c[:9], "too short for a header"),
    "html": (lambda c: b"<!DOCTYPE html><html>Not found</html>", "neither gzip nor IDX"),
    "gzip truncated": (lambda c: gzip.compress(c)[:-9], "archive is broken"),
    "gzip of something else": (lambda c: gzip.compress(b"hello" * 99), "neither gzip nor IDX"),
    "labels for images": (lambda c: idx(torch.arange(6)), "images and labels swapped"),
    "test for train": (lambda c: idx(torch.zeros(3, 4, 4).int()), "shape"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_files_are_refused_by_name(small, tmp_path, how):
    files, _ = small
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    name, (breaking, message) = "train-images-idx3-ubyte", BROKEN[how]
    (tmp_path / name).write_bytes(breaking(files[name]))
    with pytest.raises(ValueError) as error:
        data.load_mnist(tmp_path, mirrors=())
    assert str(tmp_path / name) in str(error.value) and message in str(error.value)


@pytest.fixture
def mirror():
    """A web server on the loopback: url, and a dict path -> (status, declared length or None, bytes) to fill."""
    pages = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, length, content = pages.get(self.path, (404, None, b"no such page"))
            self.send_response(status)
            self.send_header("Content-Length", str(length or len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", pages
    server.shutdown()
    server.server_close()


def test_download_from_the_second_mirror(small, mirror, tmp_path):
    files, tensors = small
    url, pages = mirror
    for name, content in files.items():
        pages[f"/good/{name}.gz"] = (200, None, gzip.compress(content))
    x_train, *_ = data.load_mnist(tmp_path / "new", mirrors=(url + "bad/", url + "good/"))
    assert torch.equal(x_train[:, 0], tensors[0] / 255)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(f"{name}.gz" for name in files)
    data.load_mnist(tmp_path / "new", mirrors=())  # and from now on from the disk


def test_bad_mirrors_are_told_apart_and_leave_nothing(small, mirror, tmp_path):
    files, _ = small
    url, pages = mirror
    name = "train-images-idx3-ubyte"
    archive = gzip.compress(files[name])
    pages.update({f"/forbidden/{name}.gz": (403, None, b"no"), f"/cut/{name}.gz": (200, len(archive), archive[:20]),
                  f"/html/{name}.gz": (200, None, b"<html>log in</html>"), f"/long/{name}.gz": (200, None, b"x" * 5000),
                  f"/other/{name}.gz": (200, None, gzip.compress(files[name][:-1] + b"?"))})
    with pytest.raises(FileNotFoundError) as error:
        data.load_mnist(tmp_path, mirrors=[url + kind + "/" for kind in ("forbidden", "cut", "html", "long", "other")])
    message = str(error.value)
    for reason in ("403", "closed after 20", "neither gzip nor IDX", "more than", "SHA-256", "--data strokes", str(tmp_path)):
        assert reason in message
    assert len(message.splitlines()) <= 10 and list(tmp_path.iterdir()) == []


def test_stroke_digits():
    x, y = data.stroke_digits(300, seed=3)
    assert x.shape == (300, 1, 28, 28) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert x.min() == 0 and x.max() == 1 and sorted(set(y.tolist())) == list(range(10))
    again, other = data.stroke_digits(300, seed=3), data.stroke_digits(300, seed=4)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(x, other[0])
    means = torch.stack([x[y == k].mean(0) for k in range(10)])  # each class is its own: a nearest mean tells them apart
    x, y = data.stroke_digits(300, seed=5)
    assert (torch.cdist(x.flatten(1), means.flatten(1)).argmin(1) == y).float().mean() > 0.7


# --- Checkpoints and the scripts, as a user runs them -------------------------------------------------------------

TINY = ["--data", "strokes", "--train-images", "200", "--device", "cpu"]


@pytest.fixture
def scripts(monkeypatch, tmp_path, drawn):
    """Runs train.main or eval.main in this process, in a folder of their own, on digits that are drawn only once."""
    monkeypatch.setattr(data, "stroke_digits", drawn)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def drawn():
    real, sets = data.stroke_digits, {}

    def stroke_digits(n, seed):
        if (n, seed) not in sets:
            sets[n, seed] = real(n, seed)
        return sets[n, seed]
    return stroke_digits


def log_of(path):
    """The rows of a log, without the time column."""
    with open(path) as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def assert_same(a, b):
    """Two nested structures of a checkpoint, equal bit for bit; times aside."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key != "seconds":
                assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b):
            assert_same(left, right)
    else:
        assert a == b


def test_scripts_end_to_end(tmp_path):
    """The two scripts as subprocesses: clean screen, files where they are said to be, an aligned table."""
    def run(*command):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    for defense in ("critic", "reference"):
        out = run(HERE / "train.py", "--arch", "mlp", "--quick", "--epochs", "1", "--defense", defense, *TINY)
        assert f"mlp-{defense}-quick-strokes-0.pt" in out and torch.__version__ in out and "seed=0" in out
    names = [f"runs/mlp-{defense}-quick-strokes-0" for defense in ("critic", "reference")]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == sorted(
        name + ending for name in names for ending in (".pt", ".csv"))
    assert [row["epoch"] for row in log_of(tmp_path / f"{names[0]}.csv")] == ["0", "1"]
    assert [row["epoch"] for row in log_of(tmp_path / f"{names[1]}.csv")] == ["1"]
    out = run(HERE / "eval.py", *[name + ".pt" for name in names], "--n", "20", "--device", "cpu").splitlines()
    assert out[0].split() == ("network defense epochs seeds test error % rho deepfool failed seconds "
                              "rho own failed reached % seconds").split()
    assert [line.split()[:4] for line in out[1:3]] == [["mlp", "critic", "1", "1"], ["mlp", "reference", "1", "1"]]
    assert "20 of strokes's test images" in out[3]


def test_resume_equals_uninterrupted(scripts, monkeypatch, capsys):
    flags = ["--arch", "mlp", "--epochs", "2", *TINY]
    assert train.main([*flags, "--out", "whole.pt"]) == 0
    real, calls = train.critic_step, []

    def interrupted(run, x, y):
        calls.append(1)
        if len(calls) == 4:  # in the middle of the second epoch
            raise KeyboardInterrupt
        return real(run, x, y)
    monkeypatch.setattr(train, "critic_step", interrupted)
    assert train.main([*flags, "--out", "parts.pt"]) == 130
    assert "--resume" in capsys.readouterr().err
    assert [row["epoch"] for row in log_of("parts.csv")] == ["0", "1"]
    os.remove("parts.csv")  # the log is the checkpoint's: it comes back
    assert train.main([*flags, "--out", "parts.pt", "--resume"]) == 0
    whole, parts = (torch.load(name, weights_only=True) for name in ("whole.pt", "parts.pt"))
    assert {"f", "D", "confidence", "adam_f", "adam_D", "settings", "log", "random"} <= whole.keys()
    assert_same(whole, parts)
    assert log_of("whole.csv") == log_of("parts.csv") and len(log_of("parts.csv")) == 3

    # The rest of what --resume promises, on the finished run.
    before = Path("parts.pt").read_bytes()
    assert train.main([*flags, "--out", "parts.pt", "--resume"]) == 0 and "finished" in capsys.readouterr().out
    assert train.main([*flags, "--out", "parts.pt"]) == 2 and "parts.pt is there already" in capsys.readouterr().err
    assert train.main([*flags, "--out", "parts.pt", "--resume", "--lam", "3"]) == 2
    assert "lam 0.5 (now 3.0)" in capsys.readouterr().err
    lenet_flags = ["--arch", "lenet", *flags[2:]]
    assert train.main([*lenet_flags, "--out", "parts.pt", "--resume"]) == 2
    assert "arch mlp (now lenet)" in capsys.readouterr().err
    assert train.main([*flags, "--out", "none.pt", "--resume"]) == 2 and "none.pt" in capsys.readouterr().err
    assert Path("parts.pt").read_bytes() == before


def test_uniform_targets_are_never_the_label(scripts, monkeypatch):
    seen = []

    def watch(f, x, target, *args, **kwargs):
        seen.append((f(x).argmax(1), target))
        return attack(f, x, target, *args, **kwargs)
    monkeypatch.setattr(train, "attack", watch)
    assert train.main(["--arch", "mlp", "--epochs", "1", "--target", "uniform", "--attack-steps", "1", *TINY]) == 0
    label, target = (torch.cat(part) for part in zip(*seen))
    assert len(label) == 200 and (label != target).all() and len(set(target.tolist())) == 10


def test_a_loss_that_is_not_finite_ends_the_run(scripts, monkeypatch, capsys):
    calls, real = [], train.BASELINES["reference"]

    def third_is_nan(f, x, y):
        calls.append(1)
        return real(f, x, y) * (math.nan if len(calls) == 3 else 1)
    monkeypatch.setitem(train.BASELINES, "reference", third_is_nan)
    assert train.main(["--arch", "mlp", "--defense", "reference", "--epochs", "2", "--out", "nan.pt", *TINY]) == 2
    error = capsys.readouterr().err
    assert "step 1 of epoch 2" in error and "nan.pt keeps the last good epoch" in error
    f, _ = evaluation.load_checkpoint("nan.pt")
    assert all(weight.isfinite().all() for weight in f.parameters())
    assert [row["epoch"] for row in log_of("nan.csv")] == ["1"]


def test_no_data_and_no_network(scripts, monkeypatch, capsys):
    def unreachable(url, limit):
        raise OSError("no route")
    monkeypatch.setattr(data, "fetch", unreachable)
    for script in (train.main, lambda flags: train.main(flags + ["--defense", "reference"])):
        assert script(["--data-dir", "nowhere"]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) <= 10 and "nowhere" in error and "--data strokes" in error
        assert all(mirror in error for mirror in data.MIRRORS) and error.count("no route") == 2
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("flags", ["--arch vgg", "--defense magic", "--epochs 0", "--epochs 1.5", "--seed -1", "--lam nan",
                                   "--lam -1", "--lambda-rec inf", "--attack-steps 0", "--target far", "--data cifar",
                                   "--device abacus", "--train-images 99", "--train-images 50001", "--out run.txt",
                                   "--defense reference --lam 0.1", "--speling"])
def test_wrong_flags_of_train(scripts, capsys, flags):
    with pytest.raises(SystemExit) as error:
        train.main(flags.split())
    assert error.value.code == 2 and flags.split()[-2 if len(flags.split()) > 1 else -1] in capsys.readouterr().err
    assert list(scripts.iterdir()) == []


@pytest.mark.parametrize("flags", ["", "x.pt --n 0", "x.pt --n 10001", "x.pt --attacks deepfool,magic", "x.pt --data cifar"])
def test_wrong_flags_of_eval(capsys, flags):
    with pytest.raises(SystemExit) as error:
        evaluation.main(flags.split())
    assert error.value.code == 2 and (flags.split() or ["CHECKPOINT"])[-1].split(",")[-1] in capsys.readouterr().err


def test_explicit_flags_override_quick():
    _, quick = train.parse_flags(["--quick"])
    _, other = train.parse_flags(["--quick", "--epochs", "7", "--lam", "0.2"])
    assert quick["epochs"] < 10 and other == {**quick, "epochs": 7, "lam": 0.2}
    _, paper = train.parse_flags(["--arch", "mlp"])
    assert paper == dict(arch="mlp", defense="critic", seed=0, data="mnist", epochs=100, train_images=50000, lam=0.5,
                         lambda_rec=0.01, lambda_grad=10.0, attack_steps=5, target="closest")


class Trap:
    """A pickle that would create a file when it is loaded without weights_only."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


def nan_weights(f):
    next(iter(f.values())).fill_(math.nan)
    return f


GOOD = {"settings": {"arch": "lenet", "data": "strokes", "defense": "critic", "epochs": 1, "seed": 0}}
BAD_CHECKPOINTS = {
    "code": lambda path: path.write_bytes(pickle.dumps(Trap())),
    "code, by torch": lambda path: torch.save({**GOOD, "f": Trap()}, path),
    "text": lambda path: path.write_text("not a checkpoint"),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(100_000)),
    "truncated": lambda path: (torch.save({**GOOD, "f": lenet().state_dict()}, path),
                               path.write_bytes(path.read_bytes()[:-50_000])),
    "another architecture's": lambda path: torch.save({**GOOD, "f": mlp().state_dict()}, path),
    "no settings": lambda path: torch.save(lenet().state_dict(), path),
    "a list": lambda path: torch.save([1, 2], path),
    "nan": lambda path: torch.save({**GOOD, "f": nan_weights(lenet().state_dict())}, path),
    "missing": lambda path: None,
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_refused_by_name(scripts, capsys, kind):
    path = scripts / "bad.pt"
    BAD_CHECKPOINTS[kind](path)
    with pytest.raises(FileNotFoundError if kind == "missing" else ValueError, match="bad.pt"):
        evaluation.load_checkpoint(path)
    assert evaluation.main([str(path)]) == 2
    assert train.main(["--out", str(path), "--resume", *TINY]) == 2
    error = capsys.readouterr().err
    assert error.count("bad.pt") >= 2 and len(error.splitlines()) <= 4 and "Traceback" not in error
    assert not Path("trapped").exists()


def test_load_checkpoint_with_weights_alone(tmp_path):
    f = lenet()
    torch.save({**GOOD, "f": f.state_dict()}, tmp_path / "weights.pt")
    loaded, info = evaluation.load_checkpoint(tmp_path / "weights.pt")
    x = torch.rand(3, 1, 28, 28)
    assert torch.equal(loaded(x), f(x)) and info == GOOD["settings"]

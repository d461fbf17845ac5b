"""The tests, in the order of the paper: each against a closed form, a finite difference in float64, a count from the
paper or an independent recomputation, and at the end the scripts as a user runs them.

    pytest      about a minute on two cores, no network; one test wants MNIST's folder in MNIST_DIR
"""
import copy
import csv
import functools
import gzip
import hashlib
import json
import math
import os
import re
import struct
import subprocess
import sys
import warnings
import xml.etree.ElementTree
import zlib
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
IN_BOX = dict(steps=500, overshoot=0.02, max_step=0.1, box=(0, 1))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(n):
    return torch.rand(n, 1, 8, 8, dtype=torch.float64)


def linear(K=5):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, K)).double()


def classifier(*layers):
    """Sure enough of itself for an attack to reach a confidence."""
    layers[-1].weight.data *= 10
    return nn.Sequential(*layers).double()


def smooth():  # second derivatives everywhere, so that finite differences converge
    return classifier(nn.Flatten(), nn.Linear(64, 7), nn.Tanh(), nn.Linear(7, 5))


def convolutional():  # LeNet's kinds of layers
    return classifier(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5))


def boundary_distances(f, x, y):
    """From each image to the boundary between y and each class of a linear model, by hand: (N,K), inf at y."""
    W, z = f[1].weight, f(x)
    return torch.tensor([[math.inf if k == y[i] else ((z[i, k] - z[i, y[i]]).abs() / (W[k] - W[y[i]]).norm()).item()
                          for k in range(len(W))] for i in range(len(x))]).double()


def pick(logits, k):
    return logits[torch.arange(len(k)), k]


def check_gradient(function, surrogate, weights):
    """The gradient of function() with respect to weights is surrogate()'s, by central differences."""
    grads = torch.autograd.grad(function(), weights, allow_unused=True)
    direction, values = [torch.randn_like(weight) for weight in weights], []
    for h in (1e-6, -2e-6):  # to one side, and from there to the other
        for weight, d in zip(weights, direction):
            weight.data += h * d
        values.append(surrogate().item())
    by_backward = sum((g * d).sum().item() for g, d in zip(grads, direction) if g is not None)
    assert by_backward == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5) != 0


# --- Figure 3 and Eq. 4: the critic -------------------------------------------------------------------------------

def test_critic_is_that_of_figure_3():
    D, x = critic(), torch.rand(3, 1, 28, 28)
    assert [layer.std for layer in D if isinstance(layer, GaussianNoise)] == [0.1, 0.5, 0.5]
    assert [layer.negative_slope for layer in D if isinstance(layer, nn.LeakyReLU)] == [0.2, 0.2]
    assert not torch.equal(D(x), D(x)) and torch.equal(D.eval()(x), D(x))  # the noise is on in training, and only there
    assert GaussianNoise(0.5)(torch.zeros(200_000)).std().item() == pytest.approx(0.5, rel=0.02)


def test_gradient_penalty():
    x, w = images(5).requires_grad_(), torch.zeros(64).double()
    w[:2] = torch.tensor([3.0, 4.0])  # |w| = 5 at every x
    assert gradient_penalty(x.flatten(1) @ w, x).item() == pytest.approx((5 - 1) ** 2)
    assert gradient_penalty((x * 0).sum((1, 2, 3)), x).item() == pytest.approx(1, rel=1e-5)  # no NaN at a zero gradient
    D, y = smooth(), torch.tensor([0, 1, 2, 3, 0])
    check_gradient(*[lambda: gradient_penalty(pick(D(x), y), x)] * 2, list(D.parameters()))


def test_critic_loss_by_hand():
    D, x, y, k = linear(K=3), images(2), torch.tensor([0, 1]), torch.tensor([2, 0])
    lengths = torch.tensor([[3.0], [1.0], [0.5]])  # of its gradients; its logits at x are its biases
    D[1].bias.data[:], D[1].weight.data[:] = torch.tensor([2.0, -1.0, 0.5]), lengths * torch.eye(64)[:1]
    x[..., 0] = 0
    real = (math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2   # -log sigmoid(D_y)
    fake = (math.log1p(math.exp(0.5)) + math.log1p(math.exp(2))) / 2  # -log(1 - sigmoid(D_k))
    penalty = ((3 - 1) ** 2 + 0) / 2 + ((0.5 - 1) ** 2 + (3 - 1) ** 2) / 2
    assert critic_loss(D, x, y, x, k, lambda_grad=0).item() == pytest.approx(real + fake)
    assert critic_loss(D, x, y, x, k).item() == pytest.approx(real + fake + 10 * penalty)


# --- Eq. 5 and Eq. 6 ----------------------------------------------------------------------------------------------

def test_classifier_loss_image_by_image():
    f, D, x = smooth(), smooth(), images(8)
    label, weights = f(x).argmax(1), list(f.parameters())
    y, C = (label + torch.arange(8) % 2) % 5, torch.linspace(0.1, 0.95, 8)
    x_adv = attack(f, x, closest_class(f, x, label), C, create_graph=True)
    loss, parts = classifier_loss(f, D, x, y, x_adv, lam=0.3, lambda_rec=0.02)
    k, nll, fool, cycle = f(x_adv).argmax(1), -pick(f(x).log_softmax(1), y).mean(), [], []
    for i in (k != label).nonzero().flatten():
        fool.append(-torch.sigmoid(D(x_adv[i:i + 1])[0, k[i]]).log())
        x_rec = attack(f, x_adv[i:i + 1], label[i:i + 1], f(x[i:i + 1]).softmax(1).max(), create_graph=True)
        cycle.append((x_rec - x[i]).square().sum())
    assert 0 < len(fool) < 8  # otherwise this shows nothing
    expected = [nll, sum(fool) / len(fool), sum(cycle) / len(cycle), torch.tensor(len(fool) / 8)]
    assert [parts[name].item() for name in ("nll", "fool", "cycle", "success")] == pytest.approx(
        [part.item() for part in expected])
    expected = nll + 0.3 * expected[1] + 0.02 * expected[2]
    assert loss.item() == pytest.approx(expected.item())
    for g, h in zip(*(torch.autograd.grad(value, weights, retain_graph=True) for value in (loss, expected))):
        assert torch.allclose(g, h)  # also through the confidence of the way back


def test_no_attack_succeeds_then_both_terms_are_zero():
    f, D, x, y = smooth(), smooth(), images(5), torch.arange(5)
    x_adv = attack(f, x, f(x).argmax(1), 1e-6, create_graph=True)  # reached from the start: x_adv = x
    loss, parts = classifier_loss(f, D, x, y, x_adv, lam=0.5)
    assert (parts["fool"], parts["cycle"], parts["success"]) == (0, 0, 0) and loss.item() == parts["nll"].item()
    grads = [torch.autograd.grad(value, list(f.parameters())) for value in (loss, F.cross_entropy(f(x), y))]
    assert all(torch.allclose(g, h) for g, h in zip(*grads))


def test_a_step_reaches_only_its_player():
    f, D, x, y = smooth(), smooth(), images(6), torch.arange(6) % 5
    x_adv = attack(f, x, closest_class(f, x, f(x).argmax(1)), 0.9, create_graph=True)
    loss_D = critic_loss(D, x, y, x_adv, f(x_adv).argmax(1))
    assert set(torch.autograd.grad(loss_D, list(f.parameters()), allow_unused=True, retain_graph=True)) == {None}
    train.minimise(loss_D, D, torch.optim.SGD(D.parameters(), lr=0.1))
    assert all(p.grad.any() for p in D.parameters()) and all(p.grad is None for p in f.parameters())
    D.zero_grad()
    train.minimise(classifier_loss(f, D, x, y, x_adv, lam=0.5)[0], f, torch.optim.SGD(f.parameters(), lr=0.1))
    assert all(p.grad.any() for p in f.parameters()) and all(p.grad is None for p in D.parameters())


# --- Eq. 7 and Algorithm 1, the target and the confidence ---------------------------------------------------------

def test_one_step_of_equation_7_by_hand():
    f = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        f[1].weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, 1.0]])), f[1].bias.copy_(torch.tensor([0.5, -0.5]))
    z0, z1 = 0.3 + 2 * 0.2 + 0.5, -0.3 + 0.2 - 0.5  # the two logits at x = (0.3, 0.2)
    p = math.exp(z1) / (math.exp(z0) + math.exp(z1))
    w = [(1 - p) * (-1 - 1), (1 - p) * (1 - 2)]     # grad log p_1 = (1 - p_1)(W_1 - W_0)
    n = math.sqrt(1e-8 + w[0] ** 2 + w[1] ** 2)
    length = 1e-4 + (math.log(0.9) - math.log(p)) / n
    x = torch.tensor([0.3, 0.2]).double().view(1, 1, 1, 2)
    x_adv = attack(f, x, torch.tensor([1]), 0.9, steps=1)
    assert x_adv.flatten().tolist() == pytest.approx([0.3 + 1.05 * length * w[0] / n, 0.2 + 1.05 * length * w[1] / n])


def test_attack_on_two_linear_classes_ends_at_the_confidence():
    """p_1 = C is a hyperplane there, log(C/(1-C)) in logit difference, and the shortest way to it along W_1 - W_0."""
    f, x, C = linear(K=2), images(20), 0.9
    target = 1 - f(x).argmax(1)
    normal = f[1].weight[target] - f[1].weight[1 - target]
    expected = (math.log(C / (1 - C)) - pick(f(x), target) + pick(f(x), 1 - target)) / normal.norm(dim=1)
    r = (attack(f, x, target, C, steps=2000, overshoot=0.0, max_step=0.01) - x).flatten(1)
    assert (r.norm(dim=1) >= expected).all() and (r.norm(dim=1) <= expected + 0.01).all()
    assert torch.allclose((r * normal).sum(1), r.norm(dim=1) * normal.norm(dim=1))  # parallel


def walk(f, x, target, C, frozen=None):
    """Algorithm 1 in four steps, by another route than attack's. Returns x_adv, and (x_i, sigmoid, indicator) of each
    step. With those of an earlier walk as frozen it is what the gradient sees: the points x_i stay as they were, f's
    present weights enter through w and log p, and an indicator is its old value plus the change of its sigmoid."""
    r, go, trace = torch.zeros_like(x), torch.ones(len(x)).double(), []
    for i in range(4):
        x_i = (frozen[i][0] if frozen else x + 1.05 * r).requires_grad_()
        log_p = pick(f(x_i).log_softmax(1), target)
        w = torch.autograd.grad(log_p.sum(), x_i)[0].flatten(1)
        norm = (w.pow(2).sum(1) + 1e-8).sqrt()
        p = log_p.exp().detach()
        trace.append((x_i.detach(), torch.sigmoid(C - p), (p < C).double()))
        go = go * (frozen[i][2] + trace[i][1] - frozen[i][1] if frozen else trace[i][2])
        r = r + ((go * (1e-4 + (C.log() - log_p.detach()).abs() / norm) / norm)[:, None] * w).view_as(x)
    return x + 1.05 * r, trace


def test_gradient_of_the_attack_with_respect_to_weights_and_confidence():
    f, x, C = smooth(), images(12), torch.linspace(0.4, 0.95, 12).double()
    target, v = closest_class(f, x, f(x).argmax(1)), torch.randn_like(x)
    C[::3] = 1.0  # never reached
    C.requires_grad_()
    x_adv, trace = walk(f, x, target, C)
    assert torch.stack([below for _, _, below in trace]).prod(0).unique().numel() == 2  # some reach C, some do not
    for create_graph in (False, True):
        found = attack(f, x, target, C, steps=4, create_graph=create_graph)
        assert torch.allclose(found, x_adv, rtol=0, atol=1e-12) and found.requires_grad == create_graph
    check_gradient(lambda: (found * v).sum(), lambda: (walk(f, x, target, C, trace)[0] * v).sum(), [*f.parameters(), C])


def test_attack_in_the_box():
    f, x = convolutional(), images(30).round()
    target = closest_class(f, x, f(x).argmax(1))
    x_adv = attack(f, x, target, 0.6, **IN_BOX)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert (f(x_adv).argmax(1) == target).all() and (pick(f(x_adv).softmax(1), target) >= 0.6).all()
    low = attack(f, x, target, 0.01, **IN_BOX)  # reached at once, yet it goes on until it is the class
    assert (f(low).argmax(1) == target).all()


def test_closest_class_of_a_linear_model():
    f, x = linear(), images(40)
    y = f(x).argmax(1)
    closest = closest_class(f, x, y)
    assert torch.equal(closest, boundary_distances(f, x, y).argmin(1)) and closest.unique().numel() > 1


def test_running_confidence_by_hand():
    confidence = RunningConfidence(3)
    assert confidence.mean.tolist() == [1, 1, 1]
    probability = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    confidence.update(probability.log())
    assert confidence.mean.tolist() == pytest.approx([0.5 + 0.5 * 0.7, 0.5 + 0.5 * 0.5, 1])
    confidence.update(probability[:1].log())
    assert confidence.mean.tolist() == pytest.approx([0.5 * 0.85 + 0.5 * 0.8, 0.75, 1])


# --- Section 5: networks, schedule, evaluation --------------------------------------------------------------------

def test_networks():
    for net, count in ((mlp(), 3_836_410), (lenet(), 582_026), (critic(), 2_395_210)):
        assert sum(p.numel() for p in net.parameters()) == count and net(torch.rand(2, 1, 28, 28)).shape == (2, 10)
        for layer in (layer for layer in net if hasattr(layer, "weight")):  # He: variance 2 / fan-in
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / layer.weight[0].numel()), rel=0.1)
            assert layer.bias.abs().max() == 0


def test_conv_pool_is_convolution_and_pooling_with_their_derivatives():
    conv, row = nn.Conv2d(1, 32, 5).double(), torch.arange(28)
    conv.weight.data.normal_(0, 2).round_()  # whole numbers: equal values of a pooling window are equal to the bit
    x = torch.randint(3, (20, 1, 28, 28)).double()
    x[:5, :, :9] = 0
    x[5:10] = ((row + row[:, None]) % 3).double()  # equal along a diagonal of the window
    cotangent, outcomes = torch.randn(20, 32, 12, 12).double(), []
    for layer in (nn.Sequential(conv, nn.MaxPool2d(2)), evaluation.ConvPool(conv)):
        x_i = x.clone().requires_grad_()
        y = layer(x_i)
        grad, = torch.autograd.grad((y * cotangent).sum(), x_i, create_graph=True)
        outcomes.append((y, grad, *torch.autograd.grad(grad.square().sum() + y.square().sum(), layer.parameters())))
    for expected, actual in zip(*outcomes):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    f, g = lenet(), evaluation.network("lenet")
    g.load_state_dict(f.state_dict())
    torch.testing.assert_close(g(x.float()), f(x.float()))
    assert type(g[0]) is evaluation.ConvPool and type(evaluation.network("lenet", "meta")[0]) is nn.Conv2d


def test_at_and_margin_on_a_linear_model():
    f, x, y = linear(K=2), images(6), torch.tensor([0, 1, 0, 1, 1, 0])
    W = f[1].weight
    x_adv = x + 0.1 * (W[1 - y] - W[y]).sign().view_as(x)  # the sign of grad NLL = (1 - p_y)(W_k - W_y)
    assert train.at(f, x, y).item() == pytest.approx((F.cross_entropy(f(x), y) + F.cross_entropy(f(x_adv), y)).item())
    f = linear()
    W, z = f[1].weight, f(x)
    loss = sum(max(0, 1 - z[i, y[i]] + max(z[i, k] for k in range(5) if k != y[i]))
               + 0.1 * max((W[y[i]] - W[k]).square().sum() for k in range(5)) for i in range(6)) / 6
    assert train.margin(f, x, y).item() == pytest.approx(loss.item())


def test_vat_is_one_power_iteration():
    """KL(p(x) || p(x + d)) of a linear model is d^T H d / 2 + O(d^3), H = W^T (diag p - p p^T) W."""
    f, x, y = linear(), images(6), torch.arange(6) % 5
    W, p, state = f[1].weight, f(x).softmax(1), torch.get_rng_state()
    loss = train.vat(f, x, y, xi=1e-4)
    torch.set_rng_state(state)
    z = torch.randn_like(x).flatten(1) @ W.T
    r = 2 * train.unit((z * p - p * (z * p).sum(1, keepdim=True)) @ W).view_as(x)
    kl = (p * (p.log() - f(x + r).log_softmax(1))).sum(1).mean()
    assert loss.item() == pytest.approx((F.cross_entropy(f(x), y) + kl).item(), rel=1e-4)


def test_pgd_stays_in_the_ball_and_the_box_and_hurts():
    f, x, y, seen = convolutional(), images(6), torch.arange(6) % 5, []
    loss = train.pgd(lambda x: (seen.append(x), f(x))[1], x, y)
    assert len(seen) == 11 and all(x_i.min() >= 0 and x_i.max() <= 1 for x_i in seen)
    length = torch.stack([(x_i - x).flatten(1).norm(dim=1) for x_i in seen]).detach()
    assert length.max() <= 2 + 1e-9 and length[-1].min() > 1 and loss > 2 * F.cross_entropy(f(x), y)


def test_learning_rates():
    run, baseline = (train.start(train.parse_flags(["--defense", name])[1], "cpu") for name in ("critic", "reference"))
    short = train.start(train.parse_flags(["--defense", "reference", "--epochs", "10"])[1], "cpu")
    for epoch, part in ((0, 1), (40, 1), (41, 0.5), (80, 0.5), (81, 0.25), (100, 0.25)):
        train.set_learning_rates(run, epoch)
        assert [adam.param_groups[0]["lr"] for adam in (run.adam_f, run.adam_D)] == [5e-4 * part, 1e-3 * part]
    train.set_learning_rates(baseline, 3)
    assert baseline.adam_f.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.95 ** 2)
    train.set_learning_rates(short, 3)
    assert short.adam_f.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.95 ** 20)


carlini_wagner = functools.partial(evaluation.carlini_wagner, steps=400, lr=0.003)
ddn = functools.partial(evaluation.ddn, steps=200)


@pytest.mark.parametrize("method, above", [
    (evaluation.deepfool, 1.04), (functools.partial(evaluation.deepfool, max_step=None), 1.04),
    (carlini_wagner, 1.015), (ddn, 1.015)])
def test_smallest_perturbations_of_a_linear_model(method, above):
    f, x = linear(), 0.3 + 0.4 * images(40)  # away from the ends of the box
    f[1].bias.data += torch.tensor([0.5, 0, 0, 0, 0]) - 50  # y's logit is negative: a masked 0 must not count as rival
    for weight in f.parameters():
        weight.data *= 30                                   # so sure that NLL points to the closest class
    y = f(x).argmax(1)
    distance, x_adv = boundary_distances(f, x, y).amin(1), method(f, x, y)
    length = (x_adv - x).flatten(1).norm(dim=1)
    assert distance.max() > 0.15  # more than one of DeepFool's steps of 0.1
    assert (f(x_adv).argmax(1) != y).all() and (length > distance).all() and length.mean() < above * distance.mean()
    assert torch.equal(method(f, x, (y + 1) % 5), x)  # f is wrong at x


def test_attacks_that_fail_return_x():
    f, x, y = classifier(nn.Flatten(), nn.Linear(64, 5)), images(3), torch.tensor([2, 2, 0])
    f[1].weight.data *= 0
    f[1].bias.data = torch.tensor([0.0, 0, 9, 0, 0]).double()  # always 2
    for method in (evaluation.deepfool, carlini_wagner, evaluation.own, ddn):
        assert torch.equal(method(f, x, y), x)


def test_attacks_on_black_and_white_pixels_and_on_a_classifier_that_is_sure():
    f, x = linear().float(), images(20).float().round()
    f[1].weight.data *= 1000  # p_y is 1 in float32, and the gradient of log p_y is 0
    y = f(x).argmax(1)
    for method in (evaluation.deepfool, evaluation.carlini_wagner, ddn):
        x_adv = method(f, x, y)
        assert (f(x_adv).argmax(1) != y).all() and x_adv.min() >= 0 and x_adv.max() <= 1


def test_rho_and_what_is_left_out_of_its_mean():
    x, r = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    assert torch.allclose(evaluation.rho(x, x + r), torch.tensor([0.2, math.nan, 0.0]), equal_nan=True)
    f, x = linear(), images(6)
    x[5] = 0
    x_adv, y = x.clone(), f(x).argmax(1)
    y[0] = (y[0] + 1) % 5                        # wrong by itself: 0
    for i in (1, 2):                             # fooled; the attack fails at 3, 4 and 5
        x_adv[i] += 100 * (f[1].weight[(y[i] + 1) % 5] - f[1].weight[y[i]]).detach().view(1, 8, 8)
    assert (f(x_adv).argmax(1) != y).tolist() == [True] * 3 + [False] * 3
    figures = evaluation.measure(f, x, y, lambda f, x, y: x_adv)
    assert figures["rho"] == pytest.approx(sum((x_adv - x)[i].norm() / x[i].norm() for i in (1, 2)).item() / 3)
    assert figures["failed"] == 3 and evaluation.error_rate(f, x, y) == pytest.approx(1 / 6)
    assert figures["length"].isinf().tolist() == [False] * 3 + [True] * 3


def test_vote_of_the_nearest():
    x_train, y_train = torch.arange(8.0).view(8, 1, 1, 1), torch.tensor([0, 0, 1, 1, 2, 2, 2, 3])
    x = torch.tensor([0.4, 2.6, 5.1]).view(3, 1, 1, 1)  # 0 0 1 1 2: the nearer pair; 1 1 2 0 2, 2 2 2 3 1
    assert evaluation.vote(x, x_train, y_train).tolist() == [0, 1, 2]


def test_what_the_tables_say(capsys):
    """Two seeds on a linear model in two classes: every figure of DDN is known from the distances."""
    f, x = linear(K=2), 0.3 + 0.4 * images(30)
    f[1].bias.data += torch.tensor([1.4, 0])  # distances around 1.5
    y = f(x).argmax(1)
    y[0] = 1 - y[0]
    row = evaluation.evaluate(f, x, y, ["deepfool", "own", "ddn"], x.repeat(5, 1, 1, 1), y.repeat(5), "")
    distance = torch.where(torch.arange(30) > 0, boundary_distances(f, x, f(x).argmax(1)).amin(1), 0)
    expected = (distance / x.flatten(1).norm(dim=1)).mean().item()
    assert row["worst"] == pytest.approx(expected, rel=0.02) and row["failed"] == [0, 0, 0] and row["half %"] == 0
    expected_at = 100 * (distance > 1.5).double().mean().item()
    assert 10 < expected_at < 90 and row["at 1.5 %"] == pytest.approx(expected_at, abs=4)
    assert row["own"] > row["deepfool"] >= row["ddn"] >= row["worst"] and abs(row["gain %"]) < 2
    assert (row["change %"], row["no change %"], row["clean error %"], row["noise: no change %"]) == (0, 100, 0, 100)
    assert row["images"] == [29] and row["failed %"] == 0 and row["reached %"] == 100
    other = {**row, "worst": row["worst"] + 0.2, "half %": 10.1, "gain %": 2.1, "failed %": 1.1}
    rows = [{**of, "name": "net", "checkpoint": path, "paper": {"test error %": .9, "own": .3}, "test error %": error}
            for of, path, error in ((row, "a.pt", 1.0), (other, "b.pt", 2.0))]
    evaluation.print_results([rows], ["deepfool", "own", "ddn"], "30 images")
    out = capsys.readouterr().out
    assert "1.50±0.71 (0.90)" in out and f"{row['worst'] + 0.1:.3f}±0.141" in out and "(0.300)" in out
    assert out.count("SUSPICIOUS") == [line.count("SUSPICIOUS") for line in out.splitlines() if "b.pt" in line][0] == 3
    collapsed = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).double()
    collapsed[1].weight.data *= 0  # no attack moves an image
    row = evaluation.evaluate(collapsed, x, y, ["deepfool", "own", "ddn"], x, y, "")
    assert row["failed %"] > 0 and math.isnan(row["change %"])


def test_png(tmp_path):
    page = torch.randint(256, (5, 7)) / 255
    evaluation.save_png(tmp_path / "page.png", page)
    content = (tmp_path / "page.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", content[16:24]) == (7, 5)
    lines = zlib.decompress(content[content.index(b"IDAT") + 4:-16])
    assert [list(lines[i + 1:i + 8]) for i in range(0, 40, 8)] == (255 * page).round().int().tolist()


# --- What holds for every attack ----------------------------------------------------------------------------------

def to_closest(f, x, y, **how):
    return attack(f, x, closest_class(f, x, y), 0.9, **how)


in_box = functools.partial(to_closest, **IN_BOX)
every_attack = pytest.mark.parametrize("method", [to_closest, in_box, evaluation.deepfool, carlini_wagner,
                                                  evaluation.own, ddn])


@every_attack
def test_batch_of_eight_equals_eight_batches_of_one(method):
    f, x = convolutional(), images(8)
    y = f(x).argmax(1)
    one_by_one = torch.cat([method(f, x[i:i + 1], y[i:i + 1]) for i in range(8)])
    assert torch.allclose(method(f, x, y), one_by_one, rtol=0, atol=1e-6) and not torch.equal(one_by_one, x)
    assert method(f, x[:0], y[:0]).shape == (0, 1, 8, 8)


@every_attack
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA"))])
def test_no_side_effects_and_no_need_of_gradients(method, device):
    f, x = nn.Sequential(convolutional(), nn.Dropout(0.0)).train().to(device), images(4).to(device)
    y = f(x).argmax(1)
    f[0][0].requires_grad_(False)
    x_before, before = x.clone(), copy.deepcopy(f.state_dict())
    x_adv = method(f, x, y)
    assert not x_adv.requires_grad and (x_adv.dtype, x_adv.device) == (x.dtype, x.device)
    assert torch.equal(x, x_before) and not x.requires_grad and x.grad is None
    assert all(torch.equal(value, before[name]) for name, value in f.state_dict().items())
    assert all(weight.grad is None for weight in f.parameters()) and f.training and torch.is_grad_enabled()
    assert [weight.requires_grad for weight in f.parameters()] == [False, False, True, True]
    with torch.no_grad():
        assert torch.allclose(method(f, x, y), x_adv, rtol=0, atol=1e-9)


# --- Data ---------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not os.environ.get("MNIST_DIR"), reason="MNIST_DIR is not set to the folder of MNIST's four files")
def test_mnist_is_mnist():
    x_train, y_train, x_test, y_test = data.load_mnist()
    assert x_train.shape == (60000, 1, 28, 28) and x_test.shape == (10000, 1, 28, 28) and y_train.dtype == torch.int64
    assert x_train.min() == 0 and x_train.max() == 1 and x_train.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert y_train[:9].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1] and y_test[:5].tolist() == [7, 2, 1, 0, 4]


def idx(values):
    header = struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    return header + bytes(values.flatten().tolist())


@pytest.fixture
def small(monkeypatch):
    """Four small files in place of MNIST's, with their true checksums: name -> bytes, and their contents."""
    tensors = [torch.randint(10, shape) for shape in ((6, 4, 4), (6,), (3, 4, 4), (3,))]
    files = {name: idx(values) for (name, _, _), values in zip(data.FILES, tensors)}
    monkeypatch.setattr(data, "FILES", tuple((name, tuple(values.shape), hashlib.sha256(files[name]).hexdigest())
                                             for name, values in zip(files, tensors)))
    return files, tensors


@pytest.mark.parametrize("where, ending", [("", ""), ("", ".gz"), ("MNIST/raw", ""), ("MNIST/raw", ".gz")])
def test_files_are_found_and_parsed(small, tmp_path, where, ending):
    files, tensors = small
    (tmp_path / where).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (tmp_path / where / (name + ending)).write_bytes(gzip.compress(content) if ending else content)
    x_train, y_train, x_test, y_test = data.load_mnist(tmp_path, mirrors=())
    assert all(torch.equal(found.round().long(), expected) for found, expected in zip(
        (x_train[:, 0] * 255, y_train, x_test[:, 0] * 255, y_test), tensors))


BROKEN = {
    "truncated": (lambda c: c[:-5], "bytes, expected"),
    "one bit flipped": (lambda c: c[:-1] + bytes([c[-1] ^ 1]), "SHA-256"),
    "html": (lambda c: b"<!DOCTYPE html><html>Not found</html>", "neither gzip nor IDX"),
    "gzip truncated": (lambda c: gzip.compress(c)[:-9], "archive is broken"),
    "labels for images": (lambda c: idx(torch.arange(6)), "neither gzip nor IDX of 3 dimensions"),
    "test for train": (lambda c: idx(torch.zeros(3, 4, 4).int()), "shape"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_files_are_refused_by_name(small, tmp_path, how):
    (name, content), (breaking, message) = next(iter(small[0].items())), BROKEN[how]
    (tmp_path / name).write_bytes(breaking(content))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} is not MNIST's {name}: ") + f".*{message}"):
        data.load_mnist(tmp_path, mirrors=())


def test_download(small, tmp_path, capsys, monkeypatch):
    (files, tensors), name = small, "train-images-idx3-ubyte"
    for folder, pages in (("good", files), ("html", {name: b"<html>log in</html>"}), ("long", {name: bytes(10**6)})):
        (tmp_path / folder).mkdir()
        for page, content in pages.items():
            (tmp_path / folder / f"{page}.gz").write_bytes(content)
    bad = [f"{tmp_path.as_uri()}/{folder}/" for folder in ("missing", "html", "long")]
    x_train, *_ = data.load_mnist(tmp_path / "new", mirrors=[*bad, f"{tmp_path.as_uri()}/good/"])
    assert torch.equal(x_train[:, 0], tensors[0] / 255)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(f"{page}.gz" for page in files)
    monkeypatch.setattr(data.load_mnist, "__defaults__", (None, bad))
    assert train.main(["--data-dir", str(tmp_path / "none"), "--out", str(tmp_path / "run.pt")]) == 2
    error = capsys.readouterr().err
    for part in ("none", "No such file", "neither gzip nor IDX", "more than", "--data strokes", *bad):
        assert part in error
    assert len(error.splitlines()) <= 10 and not (tmp_path / "none").exists()


def test_stroke_digits():
    (x, y), again, (x_other, _) = (data.stroke_digits(300, seed) for seed in (3, 3, 4))
    assert x.shape == (300, 1, 28, 28) and x.dtype == torch.float32 and x.min() == 0 and x.max() == 1
    assert y.dtype == torch.int64 and y.unique().tolist() == list(range(10))
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(x, x_other)


# --- Checkpoints and the scripts, as a user runs them -------------------------------------------------------------

TINY = ["--data", "strokes", "--train-images", "200", "--device", "cpu"]
GOOD = {"settings": {"arch": "lenet", "data": "strokes", "defense": "critic", "epochs": 1, "seed": 0}}
drawn = functools.lru_cache(data.stroke_digits)


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """For train.main and eval.main in this process: a folder of their own, and digits that are drawn only once."""
    monkeypatch.setattr(data, "stroke_digits", drawn)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def log_of(path):
    """The rows of a log, without the time column."""
    rows = csv.DictReader(Path(path).read_text().splitlines())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def leaves(value):
    """The values in a checkpoint's nested containers, in order, without the times."""
    if isinstance(value, dict):
        value = [part for name, part in value.items() if name != "seconds"]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, (list, tuple)) else [value]


def test_scripts_end_to_end(tmp_path):
    """The two scripts as subprocesses: a clean screen, the files where they are said to be, tables and pictures."""
    def run(*command):
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=170)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    names = [f"runs/mlp-{defense}-quick-strokes-0" for defense in ("critic", "reference")]
    for name, defense in zip(names, ("critic", "reference")):
        out = run(HERE / "train.py", "--arch", "mlp", "--quick", "--epochs", "1", "--defense", defense, *TINY)
        assert f"{name}.pt" in out and torch.__version__ in out and "seed=0" in out
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")} == {
        name + ending for name in names for ending in (".pt", ".csv")}
    assert [[row["epoch"] for row in log_of(tmp_path / f"{name}.csv")] for name in names] == [["0", "1"], ["1"]]
    out = run(HERE / "eval.py", *[name + ".pt" for name in names], "--n", "10", "--device", "cpu",
              "--figures", "pictures", "--json", "all.json")
    critic_row, reference_row = json.loads((tmp_path / "all.json").read_text())["results"]
    assert f"{critic_row['ddn']:.3f}" in out and "(0.131)" not in out and "10 strokes test images" in out
    assert reference_row["checkpoint"] == names[1] + ".pt" and len(reference_row["length"]) == 10
    pictures = ["accuracy-mlp.svg", "figure2-mlp.png", "figure4-mlp.png"]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == pictures
    svg = xml.etree.ElementTree.parse(tmp_path / "pictures" / pictures[0]).getroot()
    curve = svg.findall(".//{*}g/{*}polyline")[0].get("points").split()
    for i, length, x in ((0, 0, 60), (20, 1, 180), (80, 4, 540)):
        assert curve[i] == f"{x},{340 - 30 * sum(r is None or r > length for r in critic_row['length']):.1f}"


def test_resume_equals_uninterrupted(scripts, monkeypatch, capsys):
    flags, real, calls = ["--arch", "mlp", "--epochs", "2", *TINY], train.critic_step, []
    assert train.main([*flags, "--out", "whole.pt"]) == 0

    def interrupted(run, x, y):
        calls.append(1)
        if len(calls) == 4:  # in the middle of the second epoch
            raise KeyboardInterrupt
        return real(run, x, y)
    monkeypatch.setattr(train, "critic_step", interrupted)
    assert train.main([*flags, "--out", "parts.pt"]) == 130 and "--resume" in capsys.readouterr().err
    os.remove("parts.csv")  # the log is the checkpoint's: it comes back
    assert train.main([*flags, "--out", "parts.pt", "--resume"]) == 0
    whole, parts = (leaves(torch.load(name, weights_only=True)) for name in ("whole.pt", "parts.pt"))
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert log_of("whole.csv") == log_of("parts.csv") and len(log_of("parts.csv")) == 3
    assert train.main([*flags, "--out", "parts.pt", "--resume"]) == 0 and "finished" in capsys.readouterr().out
    for more, message in ([["--out", "parts.pt"], "parts.pt is there already"],
                          [["--out", "parts.pt", "--resume", "--lam", "3"], "lam 0.5 (now 3.0)"],
                          [["--out", "parts.pt", "--resume", "--arch", "lenet"], "arch mlp (now lenet)"]):
        assert train.main([*flags, *more]) == 2 and message in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run(scripts, monkeypatch, capsys):
    losses, real = iter([1, 1, math.nan, 1]), train.BASELINES["reference"]
    monkeypatch.setitem(train.BASELINES, "reference", lambda f, x, y: next(losses) * real(f, x, y))
    assert train.main(["--arch", "mlp", "--defense", "reference", "--epochs", "2", "--out", "nan.pt", *TINY]) == 2
    error = capsys.readouterr().err
    assert "step 1 of epoch 2" in error and "nan.pt keeps the last good epoch" in error
    assert [row["epoch"] for row in log_of("nan.csv")] == ["1"] and evaluation.load_checkpoint("nan.pt")


@pytest.mark.parametrize("command", [
    "train --arch vgg", "train --defense magic", "train --epochs 0", "train --epochs 1.5", "train --seed -1",
    "train --lam nan", "train --lambda-rec inf", "train --lambda-grad -1", "train --attack-steps 0",
    "train --target far", "train --data cifar", "train --device abacus", "train --train-images 99",
    "train --train-images 50001", "train --out run.txt", "train --defense reference --lam 0.1", "train --speling 1",
    "eval", "eval x.pt --n 0", "eval x.pt --n 10001", "eval x.pt --attacks deepfool,magic", "eval x.pt --data cifar",
    f"eval x.pt --figures {__file__}"])
def test_wrong_flags(scripts, capsys, command):
    script, *flags = command.split()
    with pytest.raises(SystemExit) as error:
        {"train": train.main, "eval": evaluation.main}[script](flags)
    named = ["CHECKPOINT", *(flag for flag in flags if flag.startswith("--"))][-1]
    assert error.value.code == 2 and named in capsys.readouterr().err and list(scripts.iterdir()) == []


def test_settings_and_uniform_targets():
    paper, quick = train.parse_flags(["--arch", "mlp"])[1], train.parse_flags(["--quick"])[1]
    assert paper == dict(arch="mlp", defense="critic", seed=0, data="mnist", epochs=100, train_images=50000, lam=0.5,
                         lambda_rec=0.01, lambda_grad=10.0, attack_steps=5, target="closest")
    assert quick["epochs"] < 10 and train.parse_flags(["--quick", "--epochs", "70"])[1] == {**quick, "epochs": 70}
    run, label = train.start({**paper, "target": "uniform"}, "cpu"), torch.arange(10).repeat(50)
    target = train.choose_target(run, images(500).float(), F.one_hot(label, 10))
    assert (target != label).all() and target.unique().numel() == 10


def test_bench_times_a_step(scripts):
    args, settings = train.parse_flags(["--arch", "mlp", "--data", "strokes", "--train-images", "700", "--bench"])
    seconds, peak = train.time_steps(settings, args, steps=2)
    assert 1e-3 < seconds < 60 and 100 < peak < 20_000  # MB


def damaged(path, damage):
    torch.save({**GOOD, "f": lenet().state_dict()}, path)
    path.write_bytes(damage(path.read_bytes()))


BAD_CHECKPOINTS = {
    "code": lambda path: torch.save({**GOOD, "f": type("Trap", (), {
        "__reduce__": lambda _: (os.mkdir, ("trapped",))})()}, path),  # would make a folder
    "zeros": lambda path: path.write_bytes(bytes(100_000)),
    "truncated": lambda path: damaged(path, lambda c: c[:-50_000]),
    "one bit flipped": lambda path: damaged(path, lambda c: c[:10**6] + bytes([c[10**6] ^ 1]) + c[10**6 + 1:]),
    "another architecture's": lambda path: torch.save({**GOOD, "f": mlp().state_dict()}, path),
    "nan": lambda path: torch.save({**GOOD, "f": {k: v * math.nan for k, v in lenet().state_dict().items()}}, path),
    "missing": lambda path: None,
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_refused_by_name(scripts, capsys, kind):
    path = scripts / "bad.pt"
    BAD_CHECKPOINTS[kind](path)
    assert evaluation.main([str(path)]) == 2
    assert train.main(["--out", str(path), "--resume", *TINY]) == 2
    error = capsys.readouterr().err
    assert error.count("bad.pt") >= 2 and len(error.splitlines()) <= 4 and "Traceback" not in error
    assert not Path("trapped").exists()


def test_the_examples_of_readme(scripts):
    os.mkdir("results")
    f, names = lenet(), {}
    torch.save({**GOOD, "f": f.state_dict()}, "results/lenet-critic.pt")  # a file of weights alone
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2 and names["parts"]["success"] > 0 and names["info"] == GOOD["settings"]
    torch.testing.assert_close(names["f"](names["x"]), f(names["x"]))

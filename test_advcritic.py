"""The tests, in the order of the paper: each against a closed form, a finite difference in float64, a count from the
paper or an independent recomputation, and at the end the scripts as a user runs them.

    pytest      about a minute on one core, no network; one test wants MNIST's folder in MNIST_DIR
"""
import collections
import copy
import csv
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import statistics
import struct
import subprocess
import sys
import warnings
import weakref
import xml.etree.ElementTree
import zlib
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import data
import eval as evaluation  # eval is a builtin
import train
from advcritic import (GaussianNoise, RunningConfidence, attack, attack_step, boundaries, classifier_loss,
                       closest_class, critic, critic_loss, gradient_penalty, lenet, mlp, train_step, uniform_class)
from eval import carlini_wagner, ddn, deepfool, high_confidence_attack, paper_attack

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def fresh():
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
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


def plane(dtype=torch.float32):
    """Two pixels and two classes: f(x) = x, so that the boundary is x0 = x1."""
    f = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).to(dtype)
    f[1].weight.data[:], f[1].bias.data[:] = torch.eye(2), 0
    return f


def pixels(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype).view(1, 1, 1, 2)


def jacobian(f, x):
    """f's logits (K,) and their gradients (K,d) at one image x, by torch's own function."""
    return f(x[None])[0], torch.autograd.functional.jacobian(lambda x: f(x[None])[0], x).flatten(1)


def distances(f, x, y):
    """From each image to the boundary between y and each class of f linearised there: (N,K), inf at y."""
    rows = []
    for image, label in zip(x, y):
        z, W = jacobian(f, image)
        rows.append(((z - z[label]).abs() / (W - W[label]).norm(dim=1)).index_fill(0, label, math.inf))
    return torch.stack(rows).detach()


def pick(logits, k):
    return logits[torch.arange(len(k)), k]


def check_gradient(function, weights, surrogate=None):
    """The gradient of function() with respect to weights is surrogate()'s, its own, by central differences."""
    surrogate = surrogate or function
    grads = torch.autograd.grad(function(), weights, allow_unused=True)
    direction, values = [torch.randn_like(weight) for weight in weights], []
    for h in (1e-6, -2e-6):  # to one side, and from there to the other
        for weight, d in zip(weights, direction):
            weight.data += h * d
        values.append(surrogate().item())
    by_backward = sum((g * d).sum().item() for g, d in zip(grads, direction) if g is not None)
    assert by_backward == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5) != 0


def assert_same_gradients(weights, *values, **tolerance):
    """Two scalars have the same gradient with respect to weights."""
    for g, h in zip(*(torch.autograd.grad(value, weights, retain_graph=True) for value in values)):
        torch.testing.assert_close(g, h, **tolerance)


# --- The networks; Eq. 4, the critic ------------------------------------------------------------------------------

def test_networks_layer_by_layer():
    """The critic has noise on the input of each layer, in training alone, and leaky ReLU after the hidden ones."""
    for net, count in ((mlp(), 3_836_410), (lenet(), 582_026), (critic(), 2_395_210)):
        assert sum(p.numel() for p in net.parameters()) == count and net(torch.rand(2, 1, 28, 28)).shape == (2, 10)
        for layer in (layer for layer in net if hasattr(layer, "weight")):  # He: variance 2 / fan-in
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / layer.weight[0].numel()), rel=0.1)
            assert layer.bias.abs().max() == 0

    x, net = torch.rand(3, 1, 28, 28), lenet()
    conv1, conv2, dense, last = (layer for layer in net if hasattr(layer, "weight"))
    h = F.max_pool2d(F.relu(conv2(F.max_pool2d(F.relu(conv1(x)), 2))), 2)
    torch.testing.assert_close(net(x), last(F.relu(dense(h.flatten(1)))))
    for net, noise, slope in ((mlp(), [0] * 4, 0), (critic(), [0.1, 0.5, 0.5], 0.2), (critic().eval(), [0] * 3, 0.2)):
        state, h = torch.get_rng_state(), x.flatten(1)
        found = net(x)
        torch.set_rng_state(state)
        for layer, std in zip((layer for layer in net if isinstance(layer, nn.Linear)), noise, strict=True):
            h = layer(h + std * torch.randn_like(h))
            if layer.out_features > 10:
                h = F.leaky_relu(h, slope)
        torch.testing.assert_close(found, h)


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


def test_critic_loss_image_by_image_and_its_gradient():
    """On a critic that is not linear, with noise: its gradients differ from place to place and from draw to draw."""
    D, x, x_adv, y, y_adv = smooth(), images(3), images(3), torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3])
    noisy, state, parts = nn.Sequential(nn.Flatten(), GaussianNoise(0.5), *D[1:]), torch.get_rng_state(), []
    for where, label, sign in ((x, y, -1), (x_adv, y_adv, 1)):
        for image, k in zip(where.flatten(1) + 0.5 * torch.randn(3, 64, dtype=torch.float64), label):
            z, W = jacobian(D[1:], image)
            parts += [(1 + (sign * z[k]).exp()).log() / 3, 7 * (W[k].norm() - 1) ** 2 / 3]
    torch.set_rng_state(state)
    assert critic_loss(noisy, x, y, x_adv, y_adv, lambda_grad=7).item() == pytest.approx(sum(parts).item())
    x.requires_grad_()
    assert torch.autograd.grad(critic_loss(D, x, y, 1 * x, y_adv), x, allow_unused=True) == (None,)  # both detached
    check_gradient(lambda: critic_loss(D, x, y, x_adv, y_adv), list(D.parameters()))
    flat = gradient_penalty(0 * pick(D(x), y), x)  # its gradient is 0, where the root has no derivative
    assert flat.item() == pytest.approx(1, rel=1e-5) and torch.autograd.grad(flat, D[1].weight)[0].isfinite().all()


# --- Eq. 5 and Eq. 6 ----------------------------------------------------------------------------------------------

def test_classifier_loss_image_by_image():
    f, D, x = smooth(), smooth(), images(8)
    label, weights = f(x).argmax(1), list(f.parameters())
    y, C = (label + torch.arange(8) % 2) % 5, torch.linspace(0.1, 0.95, 8)
    x_adv = attack(f, x, closest_class(f, x, label), C, create_graph=True)
    loss, parts = classifier_loss(f, D, x, y, x_adv, lam=0.3, lambda_rec=0.02)
    y_adv, nll, fool, cycle = f(x_adv).argmax(1), -pick(f(x).log_softmax(1), y).mean(), [], []
    for i in (y_adv != label).nonzero().flatten():
        fool.append(-torch.sigmoid(D(x_adv[i:i + 1])[0, y_adv[i]]).log())
        x_rec = attack(f, x_adv[i:i + 1].detach(), label[i:i + 1], f(x[i:i + 1]).softmax(1).max(), create_graph=True)
        cycle.append((x_rec - x[i]).square().sum())
    assert 0 < len(fool) < 8  # otherwise this shows nothing
    expected = [nll, sum(fool) / len(fool), sum(cycle) / len(cycle), torch.tensor(len(fool) / 8)]
    assert [parts[name].item() for name in ("nll", "fool", "cycle", "success")] == pytest.approx(
        [part.item() for part in expected])
    expected = nll + 0.3 * expected[1] + 0.02 * expected[2]
    assert loss.item() == pytest.approx(expected.item())
    assert_same_gradients(weights, loss, expected)  # also through the confidence of the way back

    x_adv = attack(f, x, label, 1e-6, create_graph=True)  # reached from the start: x_adv = x, no attack succeeds
    loss, parts = classifier_loss(f, D, x, y, x_adv, lam=0.5)
    assert (parts["fool"], parts["cycle"], parts["success"]) == (0, 0, 0) and loss.item() == parts["nll"].item()
    assert_same_gradients(weights, loss, nll)


# --- Eq. 7 and Algorithm 1 ----------------------------------------------------------------------------------------

def test_one_step_of_equation_7_by_hand():
    f = plane(torch.float64)
    f[1].weight.data[:], f[1].bias.data[:] = torch.tensor([[1.0, 2.0], [-1.0, 1.0]]), torch.tensor([0.5, -0.5])
    z0, z1 = 0.3 + 2 * 0.2 + 0.5, -0.3 + 0.2 - 0.5  # the two logits at x = (0.3, 0.2)
    p = math.exp(z1) / (math.exp(z0) + math.exp(z1))
    w = [(1 - p) * (-1 - 1), (1 - p) * (1 - 2)]     # grad log p_1 = (1 - p_1)(W_1 - W_0)
    n = math.sqrt(1e-8 + w[0] ** 2 + w[1] ** 2)
    length = 1e-4 + (math.log(0.9) - math.log(p)) / n
    r_i, p_i, logits = attack_step(f, pixels(0.3, 0.2, dtype=torch.float64), torch.tensor([1]), 0.9)
    assert r_i.flatten().tolist() == pytest.approx([length * w[0] / n, length * w[1] / n])
    assert p_i.item() == pytest.approx(p) and logits.flatten().tolist() == pytest.approx([z0, z1])


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
    x_adv, trace = walk(f, x, target, C)
    assert torch.stack([below for _, _, below in trace]).prod(0).unique().numel() == 2  # some reach C, some do not
    for tensor in (x, C):
        tensor.requires_grad_()
    for create_graph in (False, True):
        found = attack(f, x, target, C, steps=4, create_graph=create_graph)
        assert torch.allclose(found, x_adv, rtol=0, atol=1e-12) and found.requires_grad == create_graph
    assert torch.autograd.grad(found.sum(), x, retain_graph=True, allow_unused=True) == (None,)  # x is a constant
    check_gradient(lambda: (found * v).sum(), [*f.parameters(), C], lambda: (walk(f, x, target, C, trace)[0] * v).sum())


# --- Section 4: the target, the confidence, alternating minimisation ----------------------------------------------

def test_boundaries_and_targets():
    f, x, y = smooth(), images(20), torch.arange(20) % 5
    gap, norm, w = boundaries(f, x, y)
    closest, uniform = closest_class(f, x, y), uniform_class(f, x.repeat(100, 1, 1, 1), y.repeat(100))
    assert torch.equal(closest, distances(f, x, y).argmin(1)) and closest.unique().numel() > 1
    for i in range(20):
        z, W = jacobian(f, x[i])
        assert torch.allclose(gap[i], z[y[i]] - z) and torch.allclose(norm[i], (W[y[i]] - W).norm(dim=1))
        assert torch.allclose(w[i].flatten(), W[closest[i]] - W[y[i]])
        assert {*uniform[i::20].tolist()} == {*range(5)} - {y[i].item()}


def test_running_confidence_by_hand():
    confidence = RunningConfidence(3)
    assert confidence.mean.tolist() == [1, 1, 1]
    probability = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [math.nan, 0.1, 0.1]])
    confidence.update(probability.log())  # a row that is not finite is left out
    assert confidence.mean.tolist() == pytest.approx([0.5 + 0.5 * 0.7, 0.5 + 0.5 * 0.5, 1])
    confidence.update(probability[:1].log())
    assert confidence.mean.tolist() == pytest.approx([0.5 * 0.85 + 0.5 * 0.8, 0.75, 1])


def test_train_step_by_hand():
    """Both players move by SGD on their losses, the critic first, but not what requires no gradient; and the attack
    aims at the running confidence of its target after this batch's update."""
    f, D, x, y = smooth(), smooth(), images(12), torch.arange(12) % 5
    f[1].bias.requires_grad_(False)
    D[3].requires_grad_(False)
    f_new, D_new = copy.deepcopy(f), copy.deepcopy(D)
    confidence, mean = RunningConfidence(5), torch.tensor([0.01, 0.01, 0.7, 0.8, 0.9])
    confidence.mean.copy_(mean)
    found = train_step(f, D, confidence, torch.optim.SGD(f.parameters(), lr=0.2),
                       torch.optim.SGD(D.parameters(), lr=0.3), x, y, lam=0.7, lambda_rec=0.2, lambda_grad=2, steps=3)

    def descend(net, loss, lr):
        trained = [weight for weight in net.parameters() if weight.requires_grad]
        grads = torch.autograd.grad(loss, trained)
        for weight, grad in zip(trained, grads):
            weight.data -= lr * grad
        return grads
    probability, label = f_new(x).detach().softmax(1).max(1)
    for k in label.unique():
        mean[k] = 0.5 * mean[k] + 0.5 * probability[label == k].mean()
    target = closest_class(f_new, x, label)
    x_adv = attack(f_new, x, target, mean[target], steps=3, create_graph=True)
    loss_D = critic_loss(D_new, x, y, x_adv, f_new(x_adv).argmax(1), lambda_grad=2)
    grads_D = descend(D_new, loss_D, 0.3)
    loss_f, parts = classifier_loss(f_new, D_new, x, y, x_adv, lam=0.7, lambda_rec=0.2, steps=3)
    descend(f_new, loss_f, 0.2)
    for net, expected in ((f, f_new), (D, D_new)):
        torch.testing.assert_close(net.state_dict(), expected.state_dict())
    assert 0 < parts["success"] < 1 and torch.allclose(confidence.mean, mean)
    assert {name: part.item() for name, part in found.items()} == pytest.approx(
        {name: part.item() for name, part in {**parts, "critic": loss_D}.items()})
    assert not any(part.requires_grad for part in found.values())
    torch.testing.assert_close(D[1].weight.grad, grads_D[0])  # the classifier's step left nothing in the critic


def test_optimizers_of_other_networks_are_refused():
    f, D, x, y = smooth(), smooth(), images(12), torch.arange(12) % 5
    of_f, of_D, of_a_copy, of_both = (torch.optim.SGD(nn.ModuleList(nets).parameters(), lr=0.1)
                                      for nets in ([f], [D], [copy.deepcopy(f)], [f, D]))
    unreached, shared = "reaches none of the optimizer's weights", "adam_f and adam_D share weights"
    for adam_f, adam_D, says in ((of_D, of_f, unreached), (of_a_copy, of_D, unreached), (of_f, of_a_copy, unreached),
                                 (of_D, of_D, shared), (of_both, of_D, shared)):
        with pytest.raises(ValueError, match=says):
            train_step(f, D, RunningConfidence(5), adam_f, adam_D, x, y, lam=0.5)


@pytest.mark.parametrize("defense", ["critic", *train.BASELINES])
def test_a_step_reads_nothing_back_and_mixes_no_devices(monkeypatch, defense):
    """On the meta device there are no values to read; a tensor of another device would be refused."""
    monkeypatch.setattr(train, "adam", lambda net, lr, **betas: torch.optim.Adam(net.parameters(), lr))  # not fused
    run = train.start(train.parse_flags(["--defense", defense])[1], "meta")
    x, y = torch.rand(10, 1, 28, 28, device="meta"), torch.zeros(10, dtype=torch.int64, device="meta")
    for epoch in ((0, 1) if defense == "critic" else (1,)):
        parts = train.step(run, epoch, x, y)
        assert all(part.is_meta and part.shape == () for part in parts.values())


# --- Section 5: the other defenses, schedule ----------------------------------------------------------------------

def test_at_and_margin_on_a_linear_model():
    f, x = linear(), images(6)
    f[1].weight.data *= 30
    y = (f(x).argmax(1) + torch.arange(6) % 2) % 5  # some are beyond the margin
    W, z, loss = f[1].weight, f(x), train.at(f, x, y)
    x_adv = x + 0.1 * ((z.softmax(1) - F.one_hot(y, 5)) @ W).sign().view_as(x)  # the sign of grad NLL
    expected = F.cross_entropy(z, y) + F.cross_entropy(f(x_adv.detach()), y)
    assert loss.item() == pytest.approx(expected.item())
    assert_same_gradients(list(f.parameters()), loss, expected)
    loss = sum(max(0, 1 - z[i, y[i]] + max(z[i, k] for k in range(5) if k != y[i]))
               + 0.1 * max((W[y[i]] - W[k]).square().sum() for k in range(5)) for i in range(6)) / 6
    assert train.margin(f, x, y).item() == pytest.approx(loss.item())
    f = smooth()
    check_gradient(lambda: train.margin(f, x, y), list(f.parameters()))


def test_vat_is_one_power_iteration():
    """KL(p(x) || p(x + d)) of a linear model is d^T H d / 2 + O(d^3), H = W^T (diag p - p p^T) W."""
    f, x, y = linear(), images(6), torch.arange(6) % 5
    W, p, state = f[1].weight.detach(), f(x).detach().softmax(1), torch.get_rng_state()
    loss = train.vat(f, x, y, xi=1e-4)
    torch.set_rng_state(state)
    z = torch.randn_like(x).flatten(1) @ W.T
    r = 2 * train.unit((z * p - p * (z * p).sum(1, keepdim=True)) @ W).view_as(x)
    expected = F.cross_entropy(f(x), y) + (p * (p.log() - f(x + r).log_softmax(1))).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert_same_gradients(list(f.parameters()), loss, expected, rtol=1e-3, atol=1e-4)  # p(x) and r are constants


def test_pgd_image_by_image():
    f, x, y, state = convolutional(), images(6), torch.arange(6) % 5, torch.get_rng_state()
    loss = train.pgd(f, x, y)
    torch.set_rng_state(state)
    direction, radius, found = torch.randn_like(x), 2 * torch.rand(6, dtype=torch.float64) ** (1 / 64), []
    for i in range(6):
        r = radius[i] * direction[i] / direction[i].norm()
        for _ in range(10):
            x_i = (x[i] + r).clamp(0, 1).requires_grad_()
            grad, = torch.autograd.grad(-f(x_i[None]).log_softmax(1)[0, y[i]], x_i)
            r = x_i.detach() + 0.5 * grad / grad.norm() - x[i]
            if r.norm() > 2:
                r = 2 * r / r.norm()
        found.append((x[i] + r).clamp(0, 1))
    assert loss.item() == pytest.approx(F.cross_entropy(f(torch.stack(found)), y).item())
    assert_same_gradients(list(f.parameters()), loss, F.cross_entropy(f(torch.stack(found)), y))


def test_adam_and_learning_rates():
    run, baseline, short = (train.start(train.parse_flags(flags)[1], "cpu") for flags in (
        [], ["--defense", "reference"], ["--defense", "reference", "--epochs", "10"]))
    assert [adam.defaults["betas"] for adam in (run.adam_f, run.adam_D)] == [(0.5, 0.999)] * 2
    assert baseline.adam_f.defaults["betas"] == (0.9, 0.999)
    for epoch, part in ((0, 1), (40, 1), (41, 0.5), (80, 0.5), (81, 0.25), (100, 0.25)):
        train.set_learning_rates(run, epoch)
        assert [adam.param_groups[0]["lr"] for adam in (run.adam_f, run.adam_D)] == [5e-4 * part, 1e-3 * part]
    for one, epoch, power in ((baseline, 1, 0), (baseline, 3, 2), (short, 1, 0), (short, 3, 20)):
        train.set_learning_rates(one, epoch)
        assert one.adam_f.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.95 ** power)


def test_pretraining_is_plain_nll_and_fills_the_confidence_and_later_steps_get_the_settings(monkeypatch):
    flags, seen = "--lam 1 --lambda-rec 2 --lambda-grad 3 --attack-steps 4 --target uniform".split(), {}
    run, x, y = train.start(train.parse_flags(flags)[1], "cpu"), torch.rand(20, 1, 28, 28), torch.arange(20) % 10
    logits, D, confidence = run.f(x).detach(), copy.deepcopy(run.D.state_dict()), RunningConfidence(10)
    confidence.update(logits)
    parts = train.step(run, 0, x, y)
    assert list(parts) == ["nll"] and parts["nll"].item() == pytest.approx(F.cross_entropy(logits, y).item())
    assert F.cross_entropy(run.f(x), y) < parts["nll"]  # f moved, downhill
    assert torch.allclose(run.confidence.mean, confidence.mean) and confidence.mean.min() < 1
    assert all(torch.equal(weight, D[name]) for name, weight in run.D.state_dict().items())
    monkeypatch.setattr(train, "train_step", lambda *networks, **options: seen.update(options))
    train.step(run, 1, x, y)
    assert seen == dict(lam=1, lambda_rec=2, lambda_grad=3, steps=4, choose_target=uniform_class)


def test_the_first_10000_images_are_held_out(monkeypatch):
    y = torch.arange(10400)
    monkeypatch.setattr(data, "load_mnist", lambda folder: ((y % 256 / 255).view(-1, 1, 1, 1), y, None, None))
    x_train, y_train, x_val, y_val = train.load("mnist", None, 300, "cpu")
    assert torch.equal(y_train, y[10000:10300]) and torch.equal(y_val, y[:10000])
    assert torch.equal(x_train.flatten(), y_train % 256) and torch.equal(x_val.flatten(), y_val % 256)


def test_a_run_of_two_epochs(monkeypatch, tmp_path):
    """Each image once an epoch, in [0,1] and with its label; the learning rate of the epoch; the error on x_val."""
    rates, seen, y = [], [], torch.arange(200)
    x = y.byte().view(-1, 1, 1, 1).repeat(1, 1, 28, 28)

    def step(run, epoch, x, y):
        assert torch.equal(x[:, 0, 0, 0], y / 255)
        seen.extend(y.tolist())
        rates.append(run.adam_f.param_groups[0]["lr"])
        return {"loss": torch.zeros(())}
    monkeypatch.setattr(train, "step", step)
    run = train.start(train.parse_flags("--arch mlp --defense reference --epochs 2".split())[1], "cpu")
    run.f = nn.Sequential(nn.Flatten(), nn.Linear(784, 2))  # class 1: brighter than 0.4
    run.f[1].weight.data[:], run.f[1].bias.data[:] = torch.tensor([[0], [1 / 784]]), torch.tensor([0.401, 0])
    train.train(run, tmp_path / "run.pt", x, y, x, (y > 120).long())
    assert sorted(seen[:200]) == sorted(seen[200:]) == y.tolist() and seen[:200] != seen[200:]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3 * 0.95 ** 50, 1e-3 * 0.95 ** 50])
    assert run.log[1]["val_error"] == pytest.approx(18 / 200)  # 103 to 120


# --- Section 5: the attacks of the evaluation ---------------------------------------------------------------------

def test_defaults_are_those_of_the_paper():
    for function, defaults in {
            attack: (5, 0.05, False), critic_loss: (10.0,), classifier_loss: (0.01, 5),
            train_step: (0.01, 10.0, 5, closest_class), deepfool: (500, 0.1, 0.02), ddn: (1000,),
            high_confidence_attack: (500, 0.1, 0.02), carlini_wagner: (1000, 9, 0.01), train.vat: (2.0, 1e-2)}.items():
        assert getattr(function, "__wrapped__", function).__defaults__ == defaults


@pytest.mark.parametrize("max_step", [0.1, None])
def test_deepfool_image_by_image(max_step):
    """On a network whose closest class changes on the way, and with pixels at the ends of the box."""
    f = nn.Sequential(nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 10))
    for weight in f.parameters():
        weight.data *= 3
    f, x = f.double(), images(30).round()
    y, expected, changes = f(x).argmax(1), [], 0
    for image, label in zip(x, y):
        r, classes = torch.zeros_like(image), []
        while f((image + 1.02 * r).clamp(0, 1)[None]).argmax() == label:
            length, k = distances(f, (image + r)[None], [label])[0].min(0)
            _, W = jacobian(f, image + r)
            w = W[k] - W[label]
            r = r + (min(length, max_step or math.inf) + 1e-4) * (w / w.norm()).view_as(r)
            r = ((image + 1.02 * r).clamp(0, 1) - image) / 1.02
            classes.append(k.item())
        changes += len(set(classes)) > 1
        expected.append((image + 1.02 * r).clamp(0, 1))
    assert changes > 0 or max_step is None  # with full steps two or three are enough
    assert torch.allclose(deepfool(f, x, y, max_step=max_step), torch.stack(expected), rtol=0, atol=1e-9)


def test_carlini_wagner_image_by_image():
    """Adam by hand, and of each image the shortest that any step of any search found."""
    f, x = smooth(), images(6).round() * 0.8
    f[3].bias.data -= 50  # all logits are negative: a masked 0 must not count as a rival
    y, expected = f(x).argmax(1), []
    for image, label in zip(x, y):
        low, c, high, best = 0, 1e-3, math.inf, None
        for _ in range(6):
            w, m, v, found = (0.999999 * (2 * image - 1)).atanh(), 0, 0, False
            for i in range(1, 41):
                w = w.detach().requires_grad_()
                x_i = (w.tanh() + 1) / 2
                z = f(x_i[None])[0]
                gap = z[label] - max(z[k] for k in range(5) if k != label)
                grad, = torch.autograd.grad((x_i - image).square().sum() + c * gap.clamp(min=0), w)
                if gap < 0:
                    found = True
                    if best is None or (x_i - image).norm() < (best - image).norm():
                        best = x_i.detach()
                m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad ** 2
                w = w - 0.05 * (m / (1 - 0.9 ** i)) / ((v / (1 - 0.999 ** i)).sqrt() + 1e-8)
            low, high = (low, c) if found else (c, high)
            c = 10 * c if high == math.inf else (low + high) / 2
        expected.append(image if best is None else best)
    x_adv = carlini_wagner(f, x, y, steps=40, search_steps=6, lr=0.05)
    assert torch.allclose(x_adv, torch.stack(expected), rtol=0, atol=1e-6) and (f(x_adv).argmax(1) != y).any()


def test_ddn_image_by_image():
    f, x, steps = smooth(), images(8), 60
    y, expected = f(x).argmax(1), []
    for image, label in zip(x, y):
        r, length, best = torch.zeros_like(image), 1.0, None
        for i in range(steps):
            x_i = (image + r).requires_grad_()
            z = f(x_i[None])
            grad, = torch.autograd.grad(F.cross_entropy(z, label[None]), x_i)
            fooled = z.argmax() != label
            if fooled and (best is None or r.norm() < best.norm()):
                best = r
            r = r + (0.01 + 0.99 * (1 + math.cos(math.pi * i / steps)) / 2) * grad / grad.norm()
            length *= 0.95 if fooled else 1.05
            r = (image + length * r / r.norm()).clamp(0, 1) - image
        expected.append(image if best is None else image + best)
    x_adv = ddn(f, x, y, steps=steps)
    assert torch.allclose(x_adv, torch.stack(expected), rtol=0, atol=1e-7) and not torch.equal(x_adv[0], x[0])


def test_high_confidence_attack_ends_inside_the_box_at_its_confidence():
    f, x = convolutional(), images(30).round()
    target = closest_class(f, x, f(x).argmax(1))
    x_adv = high_confidence_attack(f, x, target, 0.6)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert (f(x_adv).argmax(1) == target).all() and (pick(f(x_adv).softmax(1), target) >= 0.6).all()
    low = high_confidence_attack(f, x, target, 0.01)  # reached at once, yet it goes on until it is the class
    assert (f(low).argmax(1) == target).all()
    root = high_confidence_attack(lambda x: x.sqrt().flatten(1), pixels(0.01, 0.9), torch.tensor([1]), 0.99,
                                  max_step=None)
    assert root.isfinite().all() and root.min() == 0  # has no derivative at 0, where the first step ends


@pytest.mark.parametrize("max_step", [0.1, None])
def test_high_confidence_attack_step_by_step(max_step):
    """Each step is Eq. 7's, cut before the overshoot, then clamped; with as many steps as it needs."""
    f, x = smooth(), images(8)
    target, expected = (f(x).argmax(1) + 1) % 5, x
    for _ in range(2):
        r_i, p, _ = attack_step(f, expected, target, 0.999)
        assert (p < 0.999).all()
        length = r_i.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        expected = (expected + 1.02 * r_i / length * length.clamp(max=max_step or math.inf)).clamp(0, 1)
    x_adv = high_confidence_attack(f, x, target, 0.999, steps=2, max_step=max_step)
    assert torch.allclose(x_adv, expected, rtol=0, atol=1e-12)


def test_paper_attack_goes_to_the_closest_class_and_the_clean_confidence(monkeypatch):
    f, x = smooth(), images(20)
    y = f(x).argmax(1)
    x_adv, target, C = paper_attack(f, x, y), closest_class(f, x, y), f(x).softmax(1).amax(1)
    expected = high_confidence_attack(f, x, target, C)
    there = f(expected).argmax(1) == target
    assert there.sum() > 10 and torch.equal(x_adv[there], expected[there]) and torch.equal(x_adv[~there], x[~there])
    assert (pick(f(x_adv).softmax(1), target) >= C)[there].double().mean() > 0.9
    third = x[(y != y[0]) & (y != target[0])][:1]  # of another class than image 0 and its target
    monkeypatch.setattr(evaluation, "high_confidence_attack", lambda *arguments: third)
    assert torch.equal(paper_attack(f, x[:1], y[:1]), x[:1])


# --- What holds for every attack ----------------------------------------------------------------------------------

brief_cw = functools.partial(carlini_wagner, steps=30, search_steps=5, lr=0.05)
brief_ddn = functools.partial(ddn, steps=100)
SMALLEST = [deepfool, brief_cw, brief_ddn, paper_attack]
every_attack = pytest.mark.parametrize("method", [
    *SMALLEST, lambda f, x, y: attack(f, x, closest_class(f, x, y), 0.9),
    lambda f, x, y: high_confidence_attack(f, x, closest_class(f, x, y), 0.9)])


@every_attack
def test_batch_of_eight_equals_eight_batches_of_one(method):
    f, x = convolutional(), images(8)
    y = f(x).argmax(1)
    one_by_one = torch.cat([method(f, x[i:i + 1], y[i:i + 1]) for i in range(8)])
    assert torch.allclose(method(f, x, y), one_by_one, rtol=0, atol=1e-6) and not torch.equal(one_by_one, x)
    assert method(f, x[:0], y[:0]).shape == (0, 1, 8, 8)
    other = x.to(memory_format=torch.channels_last).requires_grad_()
    assert torch.allclose(method(f, other, y), one_by_one, rtol=0, atol=1e-6) and other.grad is None


@every_attack
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA"))])
def test_no_side_effects_and_no_need_of_gradients(monkeypatch, method, device):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # Carlini-Wagner would carry rounding on to 6e-3
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
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.allclose(method(f, x * 1, y * 1), x_adv, rtol=0, atol=1e-6)


# --- What people hand in: the right number or a ValueError --------------------------------------------------------

X, Y = pixels(1.0, 0.5), torch.tensor([0])
CHECKED = [closest_class, evaluation.error_rate, *train.BASELINES.values(), lambda f, x, y: attack(f, x, y, 0.9),
           lambda f, x, y: critic_loss(f, x, y, x, y), lambda f, x, y: classifier_loss(f, plane(), x, y, x, lam=1),
           lambda f, x, y: train_step(f, f, None, None, None, x, y, lam=1)]


@pytest.mark.parametrize("calls, f, x, y, says", [
    (SMALLEST, plane(), pixels(1.000001, 0.5), Y, r"x: values from 0\.5 to 1\.000001, expected .* \[0,1\]"),
    (SMALLEST, plane(), pixels(0.5, -0.42), Y, r"x: values from -0\.42"),
    (SMALLEST, plane(), pixels(math.nan, 0.5), Y, "x: values from nan"),
    (SMALLEST, plane(), pixels(200, 3, dtype=torch.uint8), Y, r"x: torch\.uint8"),
    (SMALLEST, plane(), torch.rand(3), Y, r"x: torch\.float32 of shape \(3,\)"),
    (SMALLEST, plane(), X, Y[:, None], r"y: torch\.int64 of shape \(1, 1\), expected integers of shape \(1,\)"),
    (SMALLEST, plane(), X, Y.float(), r"y: torch\.float32"),
    (SMALLEST, plane(), X, Y + 2, "y: values from 2 to 2, expected classes 0 to 1"),
    (SMALLEST, plane(), X, Y - 1, "y: values from -1"),
    (SMALLEST, lambda x: x.flatten(1) / 0, X, Y, "f: its logits at x are not finite"),
    (SMALLEST, lambda x: (x - 0.5).sqrt().flatten(1), X, Y, "f: the gradient of its logits at x is not finite"),
    (SMALLEST, lambda x: x.detach().flatten(1).requires_grad_(), X, Y, "f: its logits have no gradient"),
    (SMALLEST, lambda x: x.detach().flatten(1), X, Y, "f: its logits have no gradient"),
    (SMALLEST + CHECKED, lambda x: x.flatten(1)[:, :1], X, Y, r"logits: .* \(1, 1\), expected .* \(1, K\) with K >= 2"),
    (SMALLEST + CHECKED, lambda x: x.flatten(), X, Y, r"logits: .* of shape \(2,\)"),
    (SMALLEST + CHECKED, lambda x: (x.flatten(1),), X, Y, "logits: tuple, expected a tensor"),
    (SMALLEST + CHECKED, plane(), X.tolist(), Y, "x: list, expected images"),
    (SMALLEST + CHECKED, plane(), X, [0], "(y|target|label): list, expected"),
])
def test_wrong_images_labels_and_networks_are_refused(calls, f, x, y, says):
    for call in calls:
        with pytest.raises(ValueError, match=says):
            call(f, x, y)


@pytest.mark.parametrize("call, says", [
    (lambda f: attack(f, X, Y, confidence=1.5), r"confidence: 1\.5, expected a probability in \(0,1\]"),
    (lambda f: attack(f, X, Y, confidence=torch.ones(1, 1)), r"confidence: .* of shape \(1, 1\)"),
    (lambda f: attack(f, X, Y, confidence=[0.9]), "confidence: list"),
    (lambda f: attack(f, X, Y[:, None], 0.9), r"target: torch\.int64 of shape \(1, 1\)"),
    (lambda f: attack(f.half(), X.half(), Y, 0.9), r"x: torch\.float16 .*, expected .* float32"),
    (lambda f: closest_class(f, X, Y.float()), r"label: torch\.float32"),
    (lambda f: critic_loss(f, X, Y, X, Y[:, None]), r"y_adv: torch\.int64 of shape \(1, 1\)"),
    (lambda f: critic_loss(f, X, Y, X.tolist(), Y), "x_adv: list"),
    (lambda f: classifier_loss(f, f, X, Y, X.tolist(), lam=1), "x_adv: list"),
    (lambda f: classifier_loss(f, f, X, Y, X[0], lam=1), r"x_adv: .* of shape \(1, 1, 2\)"),
    (lambda f: RunningConfidence(3).update(f(X)), r"logits: .* of shape \(1, 2\), expected a tensor \(N, 3\)"),
    (lambda f: high_confidence_attack(f, X, Y, confidence=math.nan), "confidence: nan"),
    (lambda f: high_confidence_attack(f, X, Y, torch.tensor([0.0])), "confidence: values from 0 to 0"),
    (lambda f: high_confidence_attack(f, X, target=Y + 2, confidence=0.9), "target: values from 2"),
    (lambda f: evaluation.error_rate(f, X, Y + 7), "y: values from 7"),
    (lambda f: evaluation.rho(X, X.tolist()), "x_adv: list"),
    (lambda f: evaluation.rho(X, X[0]), r"x_adv: .* of shape \(1, 1, 2\), expected x's shape"),
    (lambda f: evaluation.measure(f, X, Y, lambda f, x, y: x.tolist()), "method: list"),
    (lambda f: evaluation.measure(f, X, Y, lambda f, x, y: x.double()), r"method: torch\.float64"),
    (lambda f: evaluation.measure(f, X, Y, lambda f, x, y: x[0]), r"method: .* of shape \(1, 1, 2\)"),
    (lambda f: evaluation.measure(f, 255 * X, Y, lambda f, x, y: x), "x: values from 127.5 to 255"),
    (lambda f: evaluation.save_png("page.png", X), r"page: torch\.float32 of shape"),
])
def test_what_else_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call(plane())


@pytest.mark.parametrize("method", [deepfool, functools.partial(carlini_wagner, steps=100, lr=0.05),
                                    functools.partial(ddn, steps=200)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_right_length_in_every_precision_also_where_f_is_sure_or_wrong(method, dtype):
    f, x = plane(dtype), X.to(dtype)
    f[1].weight.data *= 1000  # p_y is 1, and the gradient of log p_y is 0
    x_adv = method(lambda x: f(x).double(), x, Y.int())  # logits of any floating-point type, labels of any integer type
    assert x_adv.dtype == dtype and f(x_adv).argmax(1) == 1
    length = evaluation.measure(f, x, Y, lambda f, x, y: x_adv)["length"].item()
    assert length == pytest.approx(0.5 / 2 ** 0.5, rel=0.05)
    assert evaluation.rho(x, x_adv).item() == pytest.approx(length / 1.25 ** 0.5)
    assert torch.equal(method(f, x, 1 - Y), x)


def test_an_empty_batch_needs_no_f_and_f_may_work_in_place():
    f, x = plane(), X.clone()
    for method in SMALLEST:
        assert method(None, x[:0], Y[:0]).shape == x[:0].shape
        assert evaluation.measure(None, x[:0], Y[:0], method)["failed"] == 0
        assert torch.equal(method(lambda x: f(x.sub_(0.25)), x, Y), method(lambda x: f(x - 0.25), x, Y))
    assert evaluation.measure(f, x, Y, lambda f, x, y: x.copy_(deepfool(f, x, y)))["rho"] > 0.3
    assert evaluation.error_rate(lambda x: f(x.sub_(0.25)), x, Y) == 0 and torch.equal(x, X)


def test_what_fails_is_counted():
    x, y = pixels(0.2, 1.0), torch.tensor([1])
    cases = [(lambda x: 0 * x.flatten(1) + torch.tensor([0.0, 1.0]), method) for method in SMALLEST]  # without gradient
    for outside in ((1.7, 1.0), (0.2, -0.3), (math.nan, 0.5)):  # another class, but no image
        cases.append((plane(), lambda f, x, y, outside=outside: pixels(*outside)))
    for beyond in (math.nan, math.inf):  # an image, but no class
        def g(x, beyond=beyond):
            return torch.where(x[..., 1].flatten(1) < 0.99, beyond, 1.0) * plane()(x)
        cases += [(g, deepfool), (g, brief_ddn), (g, lambda f, x, y: x * 0.5)]
        assert torch.equal(deepfool(g, x, y), x)
        assert evaluation.error_rate(g, torch.cat([x, x / 2]), torch.tensor([1, 1])) == 0.5  # no class is an error
    for f, method in cases:
        figures = evaluation.measure(f, x, y, method)
        assert figures["failed"] == 1 and figures["length"].isinf() and math.isnan(figures["rho"])


def test_measuring_needs_no_float64():
    class NoFloat64(TorchDispatchMode):  # as on a device that has none
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            assert not isinstance(found, torch.Tensor) or found.dtype != torch.float64, function
            return found
    f, x, y = linear().float(), 0.3 + 0.4 * images(12).float(), torch.arange(12) % 5
    with NoFloat64():
        row = evaluation.evaluate(f, x, y, ["deepfool", "paper"], x, y, "")
        assert 0 < evaluation.error_rate(f, x, y) < 1 and 0 < row["worst"] < 1


def test_nothing_depends_on_the_defaults_of_torch(small, scripts):
    for name, content in small[0].items():
        Path(name).write_bytes(content)
    expected = (*data.load_mnist("."), *drawn.__wrapped__(20, 3))
    for out in ("a.pt", "b.pt"):
        assert train.main([*REFERENCE, *TINY, "--out", out]) == 0
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
    found, run = (*data.load_mnist("."), *drawn.__wrapped__(20, 3)), train.start(train.parse_flags([])[1], "cpu")
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(expected, found, strict=True))
    for weight in (*run.f.parameters(), *run.D.parameters(), run.confidence.mean):
        assert (weight.dtype, weight.device.type) == (torch.float32, "cpu")
    assert log_of("a.csv") == log_of("b.csv")


def test_memory_does_not_grow_with_the_number_of_classes():
    """Of the gradients of all classes only a few are alive at any time."""
    seen, alive, net = [], [], nn.Linear(12, 50)

    def f(x):
        def look(gradient):
            seen.append(weakref.ref(gradient))
            alive.append(sum(one() is not None for one in seen))
        x.register_hook(look)
        return net(x)
    closest_class(f, torch.rand(4, 12), torch.zeros(4).long())
    assert len(seen) == 50 and max(alive) < 5


# --- Measuring: rho, the tables, the pictures ---------------------------------------------------------------------

def test_rho_and_what_is_left_out_of_its_mean():
    x, r = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    assert torch.allclose(evaluation.rho(x, x + r), torch.tensor([0.2, math.nan, 0.0]), equal_nan=True)
    x = torch.tensor([[0.3, 0.4], [0.8, 0.6], [0.6, 0.0], [0.8, 0.6], [0.6, 0.0], [0.0, 0.0]]).view(6, 1, 1, 2)
    f, y, x_adv = plane(), torch.zeros(6, dtype=torch.int64), x.clone()
    x_adv[:3] = x.flip(3)[:3]  # wrong already: 0 though it is moved; fooled, fooled; and the attack fails at 3, 4 and 5
    figures = evaluation.measure(f, x, y, lambda f, x, y: x_adv)
    assert figures["length"].tolist() == pytest.approx([0, 0.2 * 2 ** 0.5, 0.6 * 2 ** 0.5, *[math.inf] * 3])
    assert figures["rho"] == pytest.approx((0.2 + 1) * 2 ** 0.5 / 3) and figures["failed"] == 3
    assert evaluation.error_rate(f, x, y) == pytest.approx(1 / 6)


def test_vote_of_the_nearest():
    x_train, y_train = torch.arange(8.0).view(8, 1, 1, 1), torch.tensor([1, 1, 0, 0, 2, 2, 2, 3])
    x = torch.tensor([0.4, 2.6, 5.1]).view(3, 1, 1, 1)  # 1 1 0 0 2: the nearer pair; 0 0 2 1 2, 2 2 2 3 0
    assert evaluation.vote(x, x_train, y_train).tolist() == [1, 0, 2]


def test_what_the_tables_say():
    """On a linear model in two classes every figure is known from the distances."""
    f, x = linear(K=2), 0.3 + 0.4 * images(30)
    f[1].bias.data += torch.tensor([1.4, 0])  # distances around 1.5
    y = f(x).argmax(1)
    y[0] = 1 - y[0]
    distance = torch.where(torch.arange(30) > 0, distances(f, x, f(x).argmax(1)).amin(1), 0)
    row = evaluation.evaluate(f, x, y, ["deepfool", "paper", "ddn"], x.repeat(5, 1, 1, 1), y.repeat(5), "")
    assert row["worst"] == pytest.approx((distance / x.flatten(1).norm(dim=1)).mean().item(), rel=0.02)
    assert torch.allclose(row["length"], distance, rtol=0.05) and (row["length"] >= distance).all()
    assert row["paper"] > row["deepfool"] >= row["worst"] <= row["ddn"] and set(row["failed"].values()) == {0}
    assert [row[name] for name in ("looks like target %", "looks like original %", "clean error %", "noise: original %",
                                   "reached %")] == [0, 100, 0, 100, 100]
    for voted, expected in ((1 - y, [100, 0]), (torch.full_like(y, 2), [0, 0])):  # the target, and neither class
        row = evaluation.evaluate(f, x, y, ["paper"], x.repeat(5, 1, 1, 1), voted.repeat(5), "")
        assert [row["looks like target %"], row["looks like original %"]] == expected
    f[1].weight.data *= 0  # no attack moves an image
    row = evaluation.evaluate(f, x, y, ["deepfool", "paper", "ddn"], x, y, "")
    assert row["length"].isinf().any() and math.isnan(row["looks like target %"])


def test_worst_is_of_all_attacks_but_the_papers(monkeypatch):
    lengths = {"deepfool": [3.0, 1.1, 1.3, math.inf], "cw": [2.0, 1.2, 1.4, math.inf], "paper": [0.1, 0.1, 0.1, 0.1],
               "ddn": [4.0, 2.0, math.inf, math.inf]}
    found = {evaluation.ATTACKS[name]: torch.tensor(length) for name, length in lengths.items()}
    monkeypatch.setattr(evaluation, "compare_with_neighbours", lambda *arguments: {})
    monkeypatch.setattr(evaluation, "measure", lambda f, x, y, method, title: dict(
        length=found[method], rho=0.5, failed=1, seconds=2.0))
    row = evaluation.evaluate(None, torch.ones(4, 1, 2, 2), None, list(lengths), None, None, "")
    assert row["length"].tolist() == pytest.approx([2.0, 1.1, 1.3, math.inf])
    assert row["worst"] == pytest.approx((2 + 1.1 + 1.3) / 3 / 2)  # each image's norm is 2
    assert [row[f"at {length} %"] for length in (1.0, 1.25, 1.5)] == [100, 75, 50]


def test_the_tables_of_rows_from_several_files(tmp_path, capsys, monkeypatch):
    rows = [{"name": "net, 3 epochs", "checkpoint": f"{seed}.pt", "published": {"test error %": 0.9},
             "settings": {"arch": "lenet", "defense": "critic", "seed": seed, "epochs": 3},
             "test error %": 1.0 + seed, "worst": 0.2 + 0.1 * seed, "cw": cw, "ddn": 0.5, "at 1.0 %": 50.0,
             "at 1.25 %": 40.0, "at 1.5 %": 30.0, "failed": {"cw": 0, "ddn": 7 * seed},
             "length": torch.tensor([0.5, math.inf])} for seed, cw in ((0, math.nan), (1, 0.5))]
    protocol = {"caption": "2 mnist test images", "images": "the first", "attacks": {"cw": "...", "ddn": "..."}}
    monkeypatch.chdir(tmp_path)
    for name, some, how in (("a.json", rows[:1], protocol), ("b.json", rows[1:], protocol),
                            ("both.json", rows, protocol), ("c.json", rows[1:], {**protocol, "images": "others"}),
                            ("f.json", [{"settings": {"defense": "at", "seed": 0}}], protocol)):
        evaluation.save_json(Path(name), some, how)
    Path("d.json").write_text('{"results": 3}')
    both = json.loads(Path("both.json").read_text(), parse_constant=pytest.fail)  # null for what is not finite
    expected = [{**row, "cw": cw, "length": [0.5, None]} for row, cw in zip(rows, (None, 0.5))]
    assert both == {"protocol": protocol, "results": expected}
    assert evaluation.main(["a.json", "b.json", "--json", "joined.json", "--figures", "pictures"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].index("test error") < lines[1].index("worst") < lines[1].index("cw")
    assert "net, 3 epochs" in lines[2] and "1.50±0.71 (0.90)" in lines[2] and "0.250±0.071" in lines[2]
    assert "nan" in lines[2].split() and [line for line in lines if "not fooled by" in line] == [
        "1.pt: 7 images were not fooled by ddn: it failed, this is no robustness"]
    assert Path("joined.json").read_text() == Path("both.json").read_text()
    assert Path("pictures/accuracy-lenet.svg").exists()
    for files, says in ((["a.json", "c.json"], "c.json: its images"), (["a.json", "both.json"], "0.pt is given"),
                        (["d.json"], "d.json is no whole"), (["f.json"], "f.json is no whole"), (["e.json"], "e.json")):
        assert evaluation.main([*files, "--json", "bad.json"]) == 2 and says in capsys.readouterr().err
    assert not Path("bad.json").exists()


def test_png(tmp_path):
    page = torch.cat([torch.randint(256, (5, 7)) / 255, torch.tensor([[1, 1.01, -0.01, 0, 0, 0, 0.5]])])
    evaluation.save_png(str(tmp_path / "page.png"), page)
    content = (tmp_path / "page.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", content[16:24]) == (7, 6)
    assert content.endswith(b"\0\0\0\0IEND\xaeB`\x82")  # a chunk: length, kind, content, checksum
    lines = zlib.decompress(content[content.index(b"IDAT") + 4:-16])
    values = [list(lines[i + 1:i + 8]) for i in range(0, 48, 8)]
    assert values[:5] == (255 * page[:5]).round().int().tolist() and values[5] == [255, 255, 0, 0, 0, 0, 128]


def test_svg(tmp_path):
    length = torch.tensor([0.0, 0.5, 1.25, math.inf])
    groups = [[{"name": "a&b<1>", "settings": {"defense": "critic"}, "length": length}],
              [{"name": "a&b<2>", "settings": {"defense": "critic"}, "length": length}],
              [{"name": "plain", "settings": {"defense": "reference"}, "length": length / 2}]]
    evaluation.save_svg(tmp_path / "curve.svg", "MLP ± <test>", groups)
    svg = xml.etree.ElementTree.fromstring((tmp_path / "curve.svg").read_text(encoding="utf-8"))
    curves = [line for line in svg.findall(".//{*}polyline") if line.get("stroke") != "#ddd"]
    points = dict(point.split(",") for point in curves[0].get("points").split())
    assert [points[x] for x in ("70", "142", "150", "470")] == ["135.0", "135.0", "215.0", "295.0"]  # 75, 75, 50, 25%
    assert [float(curve.get("stroke-width")) for curve in curves] == [6, 6, 2.5]
    words = [text.text for text in svg.findall(".//{*}text")]
    assert {"MLP ± <test>", "a&b<1>", "a&b<2>", "reference"} <= set(words)
    ends = sorted(float(text.get("y")) for text in svg.findall(".//{*}text") if text.get("x") == "478")
    assert min(b - a for a, b in zip(ends, ends[1:])) >= 22


def test_figures_2_and_4():
    x, y = torch.zeros(10, 1, 28, 28).double(), torch.arange(10)
    f = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).double()
    x.flatten(1)[:, :10] = 0.2 + 0.6 * torch.eye(10)
    f[1].weight.data[:], f[1].bias.data[:] = 8 * torch.eye(784)[:10], 0
    f[1].bias.data[9] = -1000  # no attack reaches this class
    page, reached, alike = evaluation.figure_2(f, x, y, x.repeat(5, 1, 1, 1), y.repeat(5))
    assert page.shape == (640, 640) and (reached, alike) == (81, 81)
    cells = page.view(10, 64, 10, 64).transpose(1, 2)
    for i in range(10):
        assert cells[i, i, :4].eq(1).all() and cells[i, i, 4:-4, 4:-4].max().item() == pytest.approx(0.8, abs=1e-6)
    assert cells[3, 5, :4].eq(0).all() and cells[3, 5].max() > 0.5
    assert cells[3, 9].max() <= 0.35 and cells[9, 3].max() > 0.5  # dimmed where it fails, and only there
    f[1].bias.data[9] = 0
    (_, a, clean, right), (_, b, boundary, _), (_, c, high, fooled) = evaluation.figure_4(f, x, y)
    assert torch.equal(a, x[:8]) and (f(b).argmax(1) != y[:8]).all() and (f(c).argmax(1) != y[:8]).all()
    assert clean > 90 > 70 > boundary and high == pytest.approx(clean, abs=3) and (right, fooled) == (0, 8)
    f[1].weight.data *= 0  # no gradient: nothing is fooled, and no picture may say so
    assert [count for *_, count in evaluation.figure_4(f, x, 0 * y)] == [0, 0, 0]
    page = evaluation.tile(a, 4)
    assert page.shape == (2 * 56, 4 * 56) and torch.equal(page[56:112:2, :56:2], a[4, 0])


# --- Data ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def small(monkeypatch):
    """Four small files in place of MNIST's, with their true checksums: name -> bytes, and their contents."""
    tensors = [torch.randint(10, shape) for shape in ((6, 4, 4), (6,), (3, 4, 4), (3,))]
    files = {}
    for (name, _, _), values in zip(data.FILES, tensors):
        header = struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
        files[name] = header + bytes(values.flatten().tolist())
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


@pytest.mark.parametrize("breaking, says", [
    (lambda c: c[:-5], "bytes, beginning with"), (lambda c: c[:-1] + bytes([c[-1] ^ 1]), "expected the published 112"),
    (lambda c: gzip.compress(c)[:-9], "archive is broken"), (lambda c: b"<html>log in", "<html>")])
def test_broken_files_are_refused_by_name(small, tmp_path, breaking, says):
    name, content = next(iter(small[0].items()))
    (tmp_path / name).write_bytes(breaking(content))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} is not MNIST's {name}: ") + f".*{says}"):
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
    for part in ("none", "No such file", "<html>", "expected the published", "--data drawn", *bad):
        assert part in error
    assert len(error.splitlines()) <= 10 and not (tmp_path / "none").exists()


def test_drawn_digits():
    (x, y), again, (x_other, _) = (data.drawn_digits(300, seed) for seed in (3, 3, 4))
    assert x.shape == (300, 1, 28, 28) and x.dtype == torch.float32 and x.min() == 0 and x.max() == 1
    assert y.dtype == torch.int64 and y.unique().tolist() == list(range(10))
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(x, x_other)


# --- Checkpoints and the scripts, as a user runs them -------------------------------------------------------------

REFERENCE = ["--arch", "mlp", "--defense", "reference", "--epochs", "1"]
TINY = ["--data", "drawn", "--train-images", "100", "--device", "cpu"]
BRIEF = ["--n", "3", "--attacks", "deepfool", "--device", "cpu"]
drawn = functools.lru_cache(data.drawn_digits)


def tiny():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, 10))


def save_tiny(path, f=None, **settings):
    """A checkpoint of weights alone; returns its settings."""
    settings = {"arch": "mlp", "data": "drawn", "defense": "critic", "epochs": 1, "seed": 0, **settings}
    torch.save({"settings": settings, "f": tiny().state_dict() if f is None else f}, path)
    return settings


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """For train.main and eval.main in this process: a folder of their own, digits that are drawn only once, and small
    networks."""
    monkeypatch.setattr(data, "drawn_digits", drawn)
    monkeypatch.setitem(evaluation.NETWORKS, "mlp", tiny)
    monkeypatch.setattr(train, "critic", lambda: nn.Sequential(*tiny(), GaussianNoise(0.5)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def full_disk(monkeypatch, suffix):
    """From now on there is no room for files of this suffix, but for their first bytes."""
    real = Path.write_bytes

    def write(path, content):
        if suffix not in path.suffixes:
            return real(path, content)
        real(path, content[:5])
        raise OSError("no space left")
    monkeypatch.setattr(Path, "write_bytes", write)


def interrupted(function, *calls):
    """function, but these of its calls are interrupted as by Ctrl-C; the first is 1."""
    count = itertools.count(1)

    def call(*arguments):
        if next(count) in calls:
            raise KeyboardInterrupt
        return function(*arguments)
    return call


def log_of(path):
    """The rows of a log, without the time column."""
    rows = csv.DictReader(Path(path).read_text().splitlines())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_scripts_end_to_end(tmp_path):
    """The two scripts as subprocesses: a clean screen, the files where they are said to be, the command that is
    printed, as it is pasted, the tables."""
    name = "lenet-critic-quick-drawn-3"
    run = functools.partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True)
    flags = ["--quick", "--epochs", "1", "--seed", "3", *TINY, "--data-dir", "my data"]
    done = run([sys.executable, HERE / "train.py", *flags])
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{name}.pt" in done.stdout and torch.__version__ in done.stdout and "seed=3" in done.stdout
    assert [row["epoch"] for row in log_of(tmp_path / f"runs/{name}.csv")] == ["0", "1"]
    assert {path.name for path in tmp_path.rglob("*.*")} == {f"{name}.pt", f"{name}.csv"}
    command = shlex.split(done.stdout.splitlines()[-1].split(": ")[1])
    assert command[1:] == [str(HERE / "eval.py"), f"runs/{name}.pt", "--data-dir", "my data"]

    done = run([*command, *BRIEF, "--json", "all.json"])
    assert (done.returncode, done.stderr) == (0, "")
    row, = json.loads((tmp_path / "all.json").read_text())["results"]
    assert Path(row["checkpoint"]).stem == name and len(row["length"]) == 3 and f"{row['worst']:.3f}" in done.stdout
    assert "(0.288)" not in done.stdout and "3 drawn test images" in done.stdout


def test_what_is_evaluated(scripts, monkeypatch):
    """The error over the whole test set, attacks on the first n of one permutation, the vote by what is trained on."""
    save_tiny("net.pt")
    seen, y_train, y = [], torch.arange(20000, 30300), torch.arange(10000)
    monkeypatch.setattr(data, "load_mnist", lambda folder: (y_train / 30300, y_train, y / 10000, y))
    monkeypatch.setattr(evaluation, "error_rate", lambda f, x, y: seen.append(y) or 0)
    monkeypatch.setattr(evaluation, "evaluate", lambda f, *arguments: seen.extend(arguments) or {})
    monkeypatch.setattr(evaluation, "report", lambda *arguments: [])
    assert evaluation.main(["net.pt", "--n", "5", "--data", "mnist", "--device", "cpu"]) == 0
    whole, x, some, _, x_near, y_near, _ = seen
    assert torch.equal(whole, y) and some.tolist() == [6044, 2890, 9399, 1917, 4919] and torch.equal(x, some / 10000)
    assert torch.equal(y_near, y_train[10000:]) and torch.equal(x_near, y_near / 30300)


def test_what_is_finished_is_saved_and_printed_whatever_happens(scripts, monkeypatch, capsys):
    def rows():
        return json.loads(Path("all.json").read_text())["results"]
    for seed in (0, 1):
        save_tiny(f"a&b-{seed}.pt", seed=seed)
    flags = ["a&b-?.pt", *BRIEF, "--json", "all.json"]  # there was no shell: eval.py expands the pattern
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", interrupted(evaluation.evaluate, 1, 3))
        assert evaluation.main(flags) == 130  # in the first network: nothing is left
        assert not Path("all.json").exists() and "Table" not in capsys.readouterr().out
        assert evaluation.main(flags) == 130 and len(rows()) == 1  # in the second
        assert "a&b, 1 epochs" in capsys.readouterr().out
        patch.setattr(evaluation, "evaluate", lambda *arguments: pytest.fail("the first attack has begun"))
        assert evaluation.main(["a&b-0.pt", *flags]) == 2 and "is given twice" in capsys.readouterr().err
        assert evaluation.main([*flags[:-1], "missing/all.json"]) == 2 and "missing" in capsys.readouterr().err
        os.mkdir("runs.json")
        with pytest.raises(SystemExit):
            evaluation.main([*flags[:-1], "runs.json"])
        assert "runs.json" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "report", interrupted(evaluation.report, 1))
        assert evaluation.main(flags) == 130 and len(rows()) == 2
    assert rows()[0]["worst"] == rows()[0]["deepfool"] and "paper" not in rows()[0]
    assert evaluation.main(["a&b-0.pt", *BRIEF, "--figures", "pictures"]) == 0
    assert sorted(path.name for path in Path("pictures").iterdir()) == [
        "accuracy-mlp.svg", "figure2-a&b-0.png", *(f"figure4-a&b-0-{row}.png" for row in "abc")]
    before = sorted(os.listdir())
    full_disk(monkeypatch, ".json")
    capsys.readouterr()
    assert evaluation.main(flags) == 2 and len(rows()) == 2 and sorted(os.listdir()) == before
    said = capsys.readouterr()
    assert "no space left" in said.err and "a&b" in said.out


def test_links_stay_and_what_the_screen_cannot_show_is_replaced(scripts, monkeypatch):
    """And float32 means float32."""
    os.mkdir("disk")
    for name in ("Größe.pt", "all.json"):
        os.symlink(f"disk/{name}", name)
    for main, flags in ((train.main, [*REFERENCE, *TINY, "--out", "Größe.pt"]),
                        (evaluation.main, ["Größe.pt", *BRIEF, "--json", "all.json"])):
        screen = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        assert main(flags) == 0 and torch.backends.cudnn.allow_tf32 is False
        sys.stdout.flush()
        assert b"Gr??e" in screen.getvalue()
    assert os.path.islink("Größe.pt") and os.path.islink("all.json")
    assert evaluation.load_checkpoint("disk/Größe.pt") and json.loads(Path("disk/all.json").read_text())["results"]
    assert sorted(os.listdir("disk")) == ["Größe.pt", "all.json"]


def test_two_checkpoints_of_one_name(scripts, capsys):
    for defense in ("critic", "at"):
        os.mkdir(defense)
        save_tiny(f"{defense}/model.pt", defense=defense)
    flags = ["critic/model.pt", "at/model.pt", *BRIEF]
    assert evaluation.main(flags) == 0
    said = capsys.readouterr().out
    assert "critic/model, 1 epochs" in said and "at/model, 1 epochs" in said
    assert evaluation.main([*flags, "--figures", "."]) == 2
    assert "would overwrite each other" in capsys.readouterr().err


def test_resume_equals_uninterrupted(scripts, monkeypatch, capsys):
    flags = ["--arch", "mlp", "--epochs", "2", *TINY, "--train-images", "200", "--out"]
    assert train.main([*flags, "whole.pt"]) == 0
    monkeypatch.setattr(train, "step", interrupted(train.step, 1, 7))  # in the middle of the first and last epoch
    for more in ([], ["--resume"]):
        assert train.main([*flags, "parts.pt", *more]) == 130 and "--resume" in capsys.readouterr().err
    for _ in range(2):  # the second time there is nothing to do
        assert train.main([*flags, "parts.pt", "--resume"]) == 0 and "Done." in capsys.readouterr().out
    whole, parts = (torch.load(name, weights_only=True) for name in ("whole.pt", "parts.pt"))
    for name in ("f", "D", "confidence"):
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=0)
    assert log_of("whole.csv") == log_of("parts.csv") and len(log_of("parts.csv")) == 3
    Path("log.csv").touch()
    torch.save({name: whole[name] for name in ("settings", "log", "f")}, "weights.pt")
    for more, says in {"parts.pt": "parts.pt is there already", "log.pt": "log.csv is there already",
                       "weights.pt --resume": "weights.pt is not the whole state of a run",
                       "parts.pt --resume --lam 3": "lam 0.5 (now 3.0)",
                       "parts.pt --resume --arch lenet": "arch mlp (now lenet)"}.items():
        assert train.main([*flags, *more.split()]) == 2 and says in capsys.readouterr().err


def test_of_two_runs_that_begin_at_once_one_is_refused(scripts, monkeypatch, capsys):
    def begun(*arguments):
        assert evaluation.load_checkpoint("run.pt")[1]["epochs"] == "0 of 1"
        assert train.main([*REFERENCE, *TINY, "--out", "run.pt"]) == 2
        assert "run.pt is there already" in capsys.readouterr().err
    monkeypatch.setattr(train, "train", begun)
    monkeypatch.setattr(Path, "exists", lambda path: False)  # the second has seen no file
    assert train.main([*REFERENCE, *TINY, "--out", "run.pt"]) == 0


def test_a_full_disk(scripts, monkeypatch, capsys):
    """A log that cannot be written, also while a spreadsheet has it open, does not end a run; that a checkpoint cannot
    be written is known before the first step."""
    full_disk(monkeypatch, ".csv")
    assert train.main([*REFERENCE, "--epochs", "2", "--out", "a.pt", *TINY]) == 0
    assert capsys.readouterr().err.count("no space left") == 3
    assert evaluation.load_checkpoint("a.pt")[1]["epochs"] == 2
    full_disk(monkeypatch, ".pt")
    monkeypatch.setattr(train, "train", lambda *arguments: pytest.fail("it has begun"))
    assert train.main([*REFERENCE, *TINY, "--out", "full.pt"]) == 2 and "no space left" in capsys.readouterr().err
    assert not Path("full.pt").exists()


@pytest.mark.parametrize("loss, says", [
    (lambda run: torch.tensor(math.nan), "the loss is not finite since step 1 of epoch 2"),
    (lambda run: run.f[1].bias.data.fill_(math.inf).sign()[0], "a weight is not finite after epoch 2")])
def test_what_is_not_finite_ends_the_run(scripts, monkeypatch, capsys, loss, says):
    monkeypatch.setattr(train, "step", lambda run, epoch, x, y: {"loss": loss(run) if epoch > 1 else torch.ones(())})
    assert train.main([*REFERENCE, "--epochs", "2", "--out", "nan.pt", *TINY]) == 2
    error = capsys.readouterr().err
    assert says in error and "nan.pt keeps the last whole epoch" in error
    assert "--resume" not in error  # which would end at the same step
    assert [row["epoch"] for row in log_of("nan.csv")] == ["1"] and evaluation.load_checkpoint("nan.pt")


@pytest.mark.parametrize("command", [
    "train --arch vgg", "train --defense magic", "train --epochs 0", "train --epochs 1.5", "train --seed -1",
    "train --lam nan", "train --lambda-rec inf", "train --lambda-grad -1", "train --attack-steps 0",
    "train --target far", "train --data cifar", "train --device abacus", "train --train-images 99",
    "train --train-images 50001", "train --out run.txt", "train --defense reference --lam 0.1", "train --speling 1",
    "eval", "eval x.pt --n 0", "eval x.pt --n 10001", "eval x.pt --attacks deepfool,magic", "eval x.pt --data cifar",
    "eval x.pt --json y.pt"])
def test_wrong_flags(scripts, capsys, command):
    script, *flags = command.split()
    with pytest.raises(SystemExit) as error:
        {"train": train.main, "eval": evaluation.main}[script](flags)
    named = ["CHECKPOINT", *(flag for flag in flags if flag.startswith("--"))][-1]
    assert error.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]  # above it stands the usage
    assert list(scripts.iterdir()) == []


def test_settings_help_and_clock():
    paper, quick = train.parse_flags(["--arch", "mlp"])[1], train.parse_flags(["--quick"])[1]
    assert paper == dict(arch="mlp", defense="critic", seed=0, data="mnist", epochs=100, train_images=50000, lam=0.5,
                         lambda_rec=0.01, lambda_grad=10.0, attack_steps=5, target="closest")
    assert quick["epochs"] < 10 and train.parse_flags(["--quick", "--epochs", "70"])[1] == {**quick, "epochs": 70}
    assert (train.clock(59.6), train.clock(3600), train.clock(100000)) == ("0:01:00", "1:00:00", "27:46:40")
    for parse in (train.parse_flags, evaluation.parse_flags):
        with pytest.raises(SystemExit, match="^0$"):
            parse(["--help"])


@pytest.mark.parametrize("f, damage", [
    (type("Trap", (), {"__reduce__": lambda _: (os.mkdir, ("trapped",))})(), lambda c: c),  # code that makes a folder
    (None, lambda c: c[:-5000]),
    (None, lambda c: c[:9999] + bytes([c[9999] ^ 1]) + c[10000:]),
    (lenet().state_dict(), lambda c: c),
    ({name: part * math.nan for name, part in tiny().state_dict().items()}, lambda c: c)])
def test_bad_and_missing_checkpoints_are_refused_by_name(scripts, capsys, f, damage):
    save_tiny("bad.pt", f)
    Path("bad.pt").write_bytes(damage(Path("bad.pt").read_bytes()))
    for name in ("bad.pt", "missing.pt"):
        assert evaluation.main([name]) == 2
        assert train.main(["--out", name, "--resume", "--arch", "mlp", *TINY]) == 2
        error = capsys.readouterr().err
        assert error.count(name) >= 2 and len(error.splitlines()) <= 4 and "Traceback" not in error
    assert not Path("trapped").exists()


# --- What is shipped and what README says -------------------------------------------------------------------------

def measured():
    """What results/ holds of each network, (arch, epochs, defense): column -> its values, by seed. Of a log rho, a mean
    of five epochs, and the error on validation images; and the time of a training step."""
    found = collections.defaultdict(lambda: collections.defaultdict(dict))
    for path in (HERE / "results").glob("*-[0-9][0-9]*.json"):
        for row in json.loads(path.read_text())["results"]:
            settings, figures = row["settings"], {**row, **row.get("figure 2", {})}
            if path.stem.endswith("-cw"):  # all other figures are those of the 1,000 images
                figures = {"cw": row["cw"]}
            for column, value in figures.items():
                found[settings["arch"], settings["epochs"], settings["defense"]][column][settings["seed"]] = value
    for row in json.loads((HERE / "results/stronger.json").read_text()):
        columns = found[row["settings"]["arch"], row["settings"]["epochs"], row["settings"]["defense"]]
        columns["rho on 200 images"][0] = row["worst"]
        columns["with FAB and ALMA"][0] = row["worst with FAB and ALMA"]
    for path in (HERE / "results").glob("*-[0-9][0-9].csv"):
        arch, defense, epochs = path.stem.split("-")
        rows = list(csv.DictReader(path.read_text().splitlines()))
        columns = found[arch, int(epochs), defense]
        columns["error % at the end"][0] = 100 * float(rows[-1]["val_error"])
        rho = [float(row["rho"]) for row in rows if row["epoch"] != "0"]
        for i in range(0, len(rho), 5):
            columns[f"{i + 1} to {i + 5}"][0] = statistics.fmean(rho[i:i + 5])
    steps = json.loads((HERE / "results/steps.json").read_text())
    for (arch, _, defense), columns in found.items():
        columns["step"][0] = steps[arch][defense]
    return found


@pytest.mark.skipif(not os.environ.get("MNIST_DIR"), reason="MNIST_DIR is not set to the folder of MNIST's four files")
def test_mnist_is_mnist_and_the_shipped_networks_err_as_often_as_measured():
    x_train, y_train, x, y = data.load_mnist()
    assert x_train.shape == (60000, 1, 28, 28) and x.shape == (10000, 1, 28, 28) and y_train.dtype == torch.int64
    assert x_train.min() == 0 and x_train.max() == 1 and x_train.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert x.flatten(1).norm(dim=1).mean().item() == pytest.approx(9.3, abs=0.05)  # as README says
    assert y_train[:9].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1] and y[:5].tolist() == [7, 2, 1, 0, 4]
    figures = measured()
    for path in (HERE / "results").glob("*.pt"):
        f, info = evaluation.load_checkpoint(path)
        error = figures[info["arch"], info["epochs"], info["defense"]]["test error %"][info["seed"]]
        assert 100 * evaluation.error_rate(f, x, y) == pytest.approx(error, abs=0.001), path


def test_the_examples_of_readme(scripts):
    os.mkdir("results")
    f, names = lenet(), {}
    settings = save_tiny("results/lenet-critic.pt", f.state_dict(), arch="lenet")
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2 and names["parts"]["success"] > 0 and names["info"] == settings
    torch.testing.assert_close(names["net"](names["x"]), f(names["x"]))


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_every_command_parses(name):
    text = (HERE / name).read_text(encoding="utf-8")
    for variable, value in {"$arch": "lenet", "$defense": "vat", "$seed": "1", "$epochs": "10"}.items():
        text = text.replace(variable, value)
    found = re.findall(r"^ +python (train|eval)\.py([^#;\n]*)", text, re.MULTILINE)
    assert len(found) > 2
    for script, flags in found:
        {"train": train, "eval": evaluation}[script].parse_flags(flags.split())


@pytest.mark.parametrize("name, count", [("README.md", 54), ("results/README.md", 361)])
def test_the_tables_are_measured(name, count):
    """Each cell is what results/ holds of the network that its row, or a heading above it, names, trained for as long as
    named there or else the longest: a mean over the seeds or the seeds one by one, the paper's value in brackets."""
    figures, checked, header, heading = measured(), 0, None, ""
    longest = {arch: epochs for arch, epochs, _ in sorted(figures)}
    same = {"rho": "worst", "error %": "test error %", "looks %": "looks like target %", "DeepFool": "deepfool",
            "Carlini-Wagner, 100 images": "cw", "the paper's attack": "paper", "of 90 cells": "look like target"}
    for line in (HERE / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if header is None:
            header = cells
            continue
        above = ""
        for column, cell in zip(header[1:], cells[1:]):
            if ": " in column:  # what stands before it holds for the next columns too
                above, column = column.split(": ")
            names = f"{heading} {header[0]} {above} {cells[0]}".lower()
            networks = re.findall(r"(mlp|lenet)(?:, (\d+) epochs)?", names)
            if not networks or not cell.strip("-"):
                continue
            arch, epochs = networks[-1]
            epochs = int(epochs or longest[arch])
            if column == "ours (paper)":
                column = cells[1]
            if column == "order":
                rho = {defense: statistics.fmean(figures[arch, epochs, defense][same.get(cells[0], cells[0])].values())
                       for defense in train.BASELINES.keys() - {"pgd"} | {"critic"}}
                assert cell == " > ".join(sorted(rho, key=rho.get, reverse=True)), line
                checked += 1
            defense = re.search(r"`(\w+)`", cells[0])
            row = figures[arch, epochs, defense[1]] if defense else {}
            column = same.get(column, column)
            if column in row:
                values = row[column]
                number, _, paper = cell.rstrip(")").partition(" (")
                shown = number.split(" / ")
                if len(shown) == 1:
                    values = {0: statistics.fmean(values.values())}
                digits = len(number.partition(".")[2].partition(" ")[0])
                assert shown == [f"{values[seed]:.{digits}f}" for seed in sorted(values)], line
                if paper:
                    assert paper == f"{row['published'][0][column]:.{digits}f}", line
                checked += 1
    assert checked == count

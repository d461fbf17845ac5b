"""The tests, in the order of the paper: each against a closed form, a finite difference in float64, a count from the
paper or an independent recomputation, and at the end the scripts as a user runs them.

    pytest      half a minute on one idle core, no network; one test wants MNIST's folder in MNIST_DIR
"""
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
from torch.utils._python_dispatch import TorchDispatchMode

import data
import eval as evaluation  # eval is a builtin
import train
from advcritic import (GaussianNoise, RunningConfidence, attack, attack_step, boundaries, classifier_loss,
                       closest_class, critic, critic_loss, gradient_penalty, lenet, mlp, train_step, uniform_class)
from eval import carlini_wagner, ddn, deepfool, high_confidence_attack, measure, paper_attack

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def fresh():
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


# --- Eqs. 5, 6 and 7, and Algorithm 1 -----------------------------------------------------------------------------

def test_classifier_loss_image_by_image():
    f, D, x = smooth(), smooth(), images(8)
    label, weights = f(x).argmax(1), list(f.parameters())
    y, C = (label + torch.arange(8) % 2) % 5, torch.linspace(0.1, 0.95, 8)
    x_adv = attack(f, x, closest_class(f, x, label), C, create_graph=True)
    y_adv, nll, fool, cycle = f(x_adv).argmax(1), -pick(f(x).log_softmax(1), y).mean(), [], []
    loss, parts = classifier_loss(f, D, x, y, x_adv, y_adv, lam=0.3, lambda_rec=0.02)
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
    loss, parts = classifier_loss(f, D, x, y, x_adv, label, lam=0.5)
    assert (parts["fool"], parts["cycle"], parts["success"]) == (0, 0, 0) and loss.item() == parts["nll"].item()
    assert_same_gradients(weights, loss, nll)


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
    assert attack(f, x, target, C.float()).dtype == x.dtype
    check_gradient(lambda: (found * v).sum(), [*f.parameters(), C], lambda: (walk(f, x, target, C, trace)[0] * v).sum())


# --- Section 4: the target, the confidence, alternating minimisation ----------------------------------------------

def test_boundaries_and_targets():
    f, x, y = smooth(), images(20), torch.arange(20) % 5
    norm, distance = boundaries(f, x, y)
    closest, uniform = closest_class(f, x, y), uniform_class(f, x.repeat(100, 1, 1, 1), y.repeat(100))
    assert torch.allclose(distance, distances(f, x, y)) and not distance.requires_grad
    assert torch.equal(closest, distances(f, x, y).argmin(1)) and closest.unique().numel() > 1
    for i in range(20):
        _, W = jacobian(f, x[i])
        assert torch.allclose(norm[i], (W[y[i]] - W).norm(dim=1))
        assert {*uniform[i::20].tolist()} == {*range(5)} - {y[i].item()}


def test_running_confidence_by_hand():
    confidence = RunningConfidence(3)
    assert confidence.mean.tolist() == [1, 1, 1]
    probability = torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    confidence.update(probability.log())
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
    y_adv = f_new(x_adv).argmax(1)
    loss_D = critic_loss(D_new, x, y, x_adv, y_adv, lambda_grad=2)
    grads_D = descend(D_new, loss_D, 0.3)
    loss_f, parts = classifier_loss(f_new, D_new, x, y, x_adv, y_adv, lam=0.7, lambda_rec=0.2, steps=3)
    descend(f_new, loss_f, 0.2)
    for net, expected in ((f, f_new), (D, D_new)):
        torch.testing.assert_close(net.state_dict(), expected.state_dict())
    assert 0 < parts["success"] < 1 and torch.allclose(confidence.mean, mean)
    assert {name: part.item() for name, part in found.items()} == pytest.approx(
        {name: part.item() for name, part in {**parts, "critic": loss_D}.items()})
    assert not any(part.requires_grad for part in found.values())
    torch.testing.assert_close(D[1].weight.grad, grads_D[0])  # the classifier's step left nothing in the critic


def test_train_step_refuses_what_does_not_match():
    f, D, x, y = smooth(), smooth(), images(12), torch.arange(12) % 5
    of_f, of_D, of_a_copy = (torch.optim.SGD(net.parameters(), lr=0.1) for net in (f, D, copy.deepcopy(f)))
    unreached, shapes = "depends on none of the optimizer's weights", "do not match 12 images"
    for classes, adam_f, adam_D, labels, says in (
            (5, of_D, of_f, y, unreached), (5, of_a_copy, of_D, y, unreached), (5, of_f, of_a_copy, y, unreached),
            (4, of_f, of_D, y, shapes), (5, of_f, of_D, y[:, None], shapes), (5, of_f, of_D, y[:11], shapes)):
        with pytest.raises(ValueError, match=says):
            train_step(f, D, RunningConfidence(classes), adam_f, adam_D, x, labels, lam=0.5)
    before = copy.deepcopy(D.state_dict())
    train_step(f, D.requires_grad_(False), RunningConfidence(5), of_f, of_D, x, y, lam=0.5)
    torch.testing.assert_close(D.state_dict(), before)  # a player that is frozen does not move


@pytest.mark.parametrize("defense", ["critic", *train.BASELINES])
def test_a_step_waits_for_nothing(monkeypatch, defense):
    """On the meta device, which has no values: a step reads none back, takes no tensor of another device, and copies no
    Python number to the device, as torch.where(mask, value, 0) does."""
    class OnlyMeta(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            for value in (*args, found):
                assert not isinstance(value, torch.Tensor) or value.is_meta, function
            assert function not in (torch.ops.aten.scalar_tensor.default, torch.ops.aten.lift_fresh.default), function
            return found
    monkeypatch.setattr(train, "adam", lambda net, lr, betas: torch.optim.SGD(net.parameters(), lr, foreach=False))
    run = train.start(train.parse_flags(["--defense", defense])[1], "meta")
    x, y = torch.rand(10, 1, 28, 28, device="meta"), torch.zeros(10, dtype=torch.int64, device="meta")
    for epoch in ((0, 1) if defense == "critic" else (1,)):
        with OnlyMeta():
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
    flags, seen = "--lam 1 --lambda-rec 2 --lambda-grad 3 --attack-steps 4 --target uniform".split(), []
    run, x, y = train.start(train.parse_flags(flags)[1], "cpu"), torch.rand(20, 1, 28, 28), torch.arange(20) % 10
    logits, D, confidence = run.f(x).detach(), copy.deepcopy(run.D.state_dict()), RunningConfidence(10)
    confidence.update(logits)
    parts = train.step(run, 0, x, y)
    assert list(parts) == ["nll"] and parts["nll"].item() == pytest.approx(F.cross_entropy(logits, y).item())
    assert F.cross_entropy(run.f(x), y) < parts["nll"]  # f moved, downhill
    assert torch.allclose(run.confidence.mean, confidence.mean) and confidence.mean.min() < 1
    assert all(torch.equal(weight, D[name]) for name, weight in run.D.state_dict().items())
    monkeypatch.setattr(train, "train_step", lambda *arguments: seen.extend(arguments))
    train.step(run, 1, x, y)
    assert seen[2] is run.confidence and seen[7:] == [1, 2, 3, 4, uniform_class]


def test_what_is_trained_on_and_a_run_of_two_epochs(monkeypatch, tmp_path):
    """The first 10,000 images are held out. Each other one once an epoch with its label, at the epoch's learning rate;
    the error on those held out."""
    rates, seen, y = [], [], torch.arange(10400)
    x = (y % 251 / 251).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)

    def step(run, epoch, x, y):
        assert torch.equal(x[:, 0, 0, 0], y % 251 / 251)
        seen.extend(y.tolist())
        rates.append(run.adam_f.param_groups[0]["lr"])
        return {"loss": torch.zeros(())}
    monkeypatch.setattr(train, "step", step)
    monkeypatch.setattr(train, "error_rate", lambda f, x, y: len(y) / 1e6 if torch.equal(y, torch.arange(10000)) else 1)
    monkeypatch.setattr(train, "measure", lambda f, x, y, attack: {"rho": 0.1 * (attack is deepfool)})
    monkeypatch.setattr(data, "load", lambda source, folder: (x, y, None, None))
    flags = "--arch mlp --defense reference --epochs 2 --train-images 300 --device cpu --out".split()
    assert train.main([*flags, str(tmp_path / "run.pt")]) == 0
    assert sorted(seen[:300]) == sorted(seen[300:]) == list(range(10000, 10300)) and seen[:300] != seen[300:]
    assert rates == pytest.approx([1e-3] * 3 + [1e-3 * 0.95 ** 50] * 3)
    assert [(row["val_error"], row["deepfool"]) for row in log_of(tmp_path / "run.csv")] == [("0.01", "0.1")] * 2


# --- Section 5: the attacks of the evaluation ---------------------------------------------------------------------

def test_defaults_are_those_of_the_paper():
    for function, defaults in {
            attack: (5, 0.05, False), critic_loss: (10.0,), classifier_loss: (0.01, 5),
            train_step: (0.01, 10.0, 5, closest_class), deepfool: (500, 0.1, 0.02), ddn: (100, 9),
            high_confidence_attack: (500, 0.1, 0.02), carlini_wagner: (1000, 9, 0.01), train.vat: (2.0, 1e-2)}.items():
        assert getattr(function, "__wrapped__", function).__defaults__ == defaults


@pytest.mark.parametrize("max_step", [0.1, math.inf])
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
            r = r + (min(length, max_step) + 1e-4) * (w / w.norm()).view_as(r)
            r = ((image + 1.02 * r).clamp(0, 1) - image) / 1.02
            classes.append(k.item())
        changes += len(set(classes)) > 1
        expected.append((image + 1.02 * r).clamp(0, 1))
    assert changes > 0 or max_step == math.inf  # with full steps two or three are enough
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


@pytest.mark.parametrize("K, classes", [(3, 9), (5, 9), (20, 2)])
def test_ddn_finds_the_distance_to_the_boundaries_of_a_linear_classifier(K, classes):
    """At any scale of the logits."""
    f, x = linear(K), 0.4 + 0.2 * images(20)
    y = f(x).argmax(1)
    distance = distances(f, x, y).amin(1)
    for scale in (1, 100, 0.01):
        length = measure(lambda x: scale * f(x), x, y, functools.partial(ddn, classes=classes))["length"]
        assert (length >= distance - 1e-9).all() and (length <= 1.01 * distance).all()


def test_ddn_where_the_box_cuts_the_way_off():
    """The closest image of class 1 in [0,1] is clamp(x + t w), with the t that puts it onto the boundary."""
    f, x = linear(2), images(20).round()
    W, y = f[1].weight.detach(), f(x).argmax(1)
    w = torch.where(y == 0, 1, -1).double()[:, None] * (W[1] - W[0])
    low, high = torch.zeros(20, 1).double(), torch.full((20, 1), 1e3).double()
    for _ in range(60):
        t = (low + high) / 2
        beyond = (f((x.flatten(1) + t * w).clamp(0, 1)).argmax(1) != y)[:, None]
        low, high = torch.where(beyond, low, t), torch.where(beyond, t, high)
    expected = ((x.flatten(1) + high * w).clamp(0, 1) - x.flatten(1)).norm(dim=1)
    assert (expected > 1.2 * distances(f, x, y).amin(1)).any()  # the box matters
    length = measure(f, x, y, ddn)["length"]
    assert (length >= expected - 1e-9).all() and (length <= 1.02 * expected).all()


def test_ddn_where_the_likelihood_leads_to_the_farther_class():
    """Of three classes on a plane, 1 is at the distance 0.1 and 2 at 0.15, but grad NLL points rather to 2."""
    def f(x):
        a, b = x.flatten(1).unbind(1)
        return torch.stack([0 * a, 30 * (a - 0.6), 6 * (b - 0.65)], 1)
    x, y = pixels(0.5, 0.5, dtype=torch.float64), torch.tensor([0])
    x_i = x.clone().requires_grad_()
    to_1, to_2 = torch.autograd.grad(F.cross_entropy(f(x_i), y), x_i)[0].flatten()
    assert to_2 > 1.5 * to_1 > 0
    assert measure(f, x, y, ddn)["length"].item() == pytest.approx(0.1, rel=0.01)


def test_ddn_against_a_grid_over_two_pixels():
    f = nn.Sequential(nn.Flatten(), nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    for layer in (layer for layer in f if hasattr(layer, "weight")):
        layer.weight.data *= 3
    axis = torch.linspace(0, 1, 1501)
    grid = torch.cartesian_prod(axis, axis).view(-1, 1, 1, 2)
    with torch.no_grad():
        label = f(grid).argmax(1)
    x = torch.rand(40, 1, 1, 2)
    y, length, compared = f(x).argmax(1), None, 0
    length = measure(f, x, y, ddn)["length"]
    for image, k, found in zip(x, y, length):
        smallest = (grid[label != k] - image).flatten(1).norm(dim=1).min()
        if smallest > 0.05:  # otherwise the grid is too coarse for 1%
            assert found <= 1.01 * smallest
            compared += 1
    assert compared > 10


@pytest.mark.parametrize("max_step", [0.1, math.inf])
def test_high_confidence_attack_step_by_step(max_step):
    """Each step is Eq. 7's, cut before the overshoot, then clamped; with as many steps as it needs."""
    f, x = smooth(), images(8)
    target, expected = (f(x).argmax(1) + 1) % 5, x
    for _ in range(2):
        r_i, p, _ = attack_step(f, expected, target, 0.999)
        assert (p < 0.999).all()
        length = r_i.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        expected = (expected + 1.02 * r_i / length * length.clamp(max=max_step)).clamp(0, 1)
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


brief_cw = functools.partial(carlini_wagner, steps=30, search_steps=5, lr=0.05)
SMALLEST = [deepfool, brief_cw, functools.partial(ddn, steps=30), paper_attack]


@pytest.mark.parametrize("method", [*SMALLEST, lambda f, x, y: attack(f, x, closest_class(f, x, y), 0.9),
                                    lambda f, x, y: high_confidence_attack(f, x, closest_class(f, x, y), 0.9)])
def test_every_attack_takes_each_image_by_itself_and_changes_nothing(method):
    f, x = nn.Sequential(convolutional(), nn.Dropout(0.0)).train(), images(8)
    f[0][0].requires_grad_(False)
    y, x_before, before = f(x).argmax(1), x.clone(), copy.deepcopy(f.state_dict())
    one_by_one = torch.cat([method(f, x[i:i + 1], y[i:i + 1]) for i in range(8)])
    assert not torch.equal(one_by_one, x) and one_by_one.dtype == x.dtype
    other = x.to(memory_format=torch.channels_last).requires_grad_()
    with torch.no_grad():
        outcomes = [method(f, x, y)]
    for x_adv in (*outcomes, method(f, x, y), method(f, other, y)):
        assert torch.allclose(x_adv, one_by_one, rtol=0, atol=1e-6) and not x_adv.requires_grad
    assert torch.equal(x, x_before) and not x.requires_grad and other.grad is None
    torch.testing.assert_close(f.state_dict(), before, rtol=0, atol=0)
    assert all(weight.grad is None for weight in f.parameters()) and f.training
    assert [weight.requires_grad for weight in f.parameters()] == [False, False, True, True]


# --- Measuring: what counts, what is refused, the tables, the pictures --------------------------------------------

def test_rho_and_what_fails():
    """An image that is wrong by itself counts 0, though it is moved. What does not fool f, or is no image, failed."""
    x = torch.tensor([[0.3, 0.4], [0.8, 0.6], [0.6, 0.0], [0.8, 0.6], [0.6, 0.2], [0.6, 0.2], [0.0, 0.0]])
    f, x, y = plane(), x.view(7, 1, 1, 2), torch.zeros(7, dtype=torch.int64)
    x_adv = x.clone()
    x_adv[:3] = x.flip(3)[:3]
    x_adv[3:6] = torch.tensor([[0.5, 1 + 1e-7], [0.5, 1.001], [math.nan, 0.5]]).view(3, 1, 1, 2)
    found = measure(f, x, y, lambda f, x_right, y: x_adv[1:])
    length = [0, 0.2 * 2 ** 0.5, 0.6 * 2 ** 0.5, 0.5, math.inf, math.inf, math.inf]
    assert found["length"].tolist() == pytest.approx(length) and found["failed"] == 3
    assert found["rho"] == pytest.approx((0.2 * 2 ** 0.5 + 2 ** 0.5 + 0.5) / 4)
    assert evaluation.error_rate(f, x, y) == pytest.approx(1 / 7)
    for method in SMALLEST:  # without a gradient no image moves
        found = measure(lambda x: 0 * x.flatten(1) + torch.tensor([1.0, 0.0]), x, y, method)
        assert torch.equal(found["x_adv"], x) and found["failed"] == 7 and math.isnan(found["rho"])


X, Y = pixels(1.0, 0.5), torch.tensor([0])


@pytest.mark.parametrize("f, x, y, says", [
    (plane(), pixels(1.000001, 0.5), Y, r"x: .* from 0\.5 to 1\.000001, expected images in \[0,1\]"),
    (plane(), pixels(math.nan, 0.5), Y, "x: .* from nan"),
    (plane(), pixels(200, 3, dtype=torch.uint8), Y, r"x: torch\.uint8"),
    (plane(), torch.rand(3), Y, r"x: torch\.float32 \(3,\)"),
    (plane(), X, Y[:, None], r"y: torch\.int64 \(1, 1\)"),
    (plane(), X, Y.float(), r"y: torch\.float32"),
    (plane(), X, Y + 2, "y: .* from 2 to 2"),
    (plane(), X, Y - 1, "y: .* from -1"),
    (lambda x: x.flatten(1) / 0, X, Y, "f: its logits at x are not finite"),
    (lambda x: x.flatten(1)[:, :1], X, Y, r"f: logits of shape \(1, 1\), expected \(1, K\) with K > 1"),
    (lambda x: x, X, Y, r"f: logits of shape \(1, 1, 1, 2\)"),
    (nn.Sequential(plane(), nn.Dropout(0.9)), X.repeat(20, 1, 1, 1), Y.repeat(20), "eval mode"),
    (nn.Sequential(nn.BatchNorm2d(1), plane()), torch.rand(20, 1, 1, 2), Y.repeat(20), "eval mode")])
def test_measure_refuses(f, x, y, says):
    with pytest.raises(ValueError, match=says):
        measure(f, x, y, lambda f, x, y: x)
    with pytest.raises(ValueError, match=r"attack: it returned \(1, 1, 2\)"):
        measure(plane(), X, Y, lambda f, x, y: x[0])


def test_what_the_tables_say(tmp_path):
    """On a linear model in two classes every figure is known from the distances."""
    f, x = linear(K=2), 0.3 + 0.4 * images(30)
    f[1].bias.data += torch.tensor([1.4, 0])  # distances around 1.5
    y = f(x).argmax(1)
    y[0] = 1 - y[0]
    distance = torch.where(torch.arange(30) > 0, distances(f, x, f(x).argmax(1)).amin(1), 0)
    for voted, looks in ((y, [0, 100]), (1 - y, [100, 0]), (torch.full_like(y, 2), [0, 0])):
        row = evaluation.evaluate(f, x, y, ["deepfool", "paper", "ddn"], x.repeat(5, 1, 1, 1), voted.repeat(5), "")
        assert [row["looks like target %"], row["looks like original %"]] == looks
    assert row["rho"] == pytest.approx((distance / x.flatten(1).norm(dim=1)).mean().item(), rel=0.01)
    assert torch.allclose(row["length"], distance, rtol=0.02) and (row["length"] >= distance).all()
    assert row["at 1.5 %"] == pytest.approx(100 * (row["length"] > 1.5).double().mean().item()) != 0
    assert row["paper"] > row["deepfool"] >= row["rho"] <= row["ddn"] and set(row["failed"].values()) == {0}

    settings = dict(arch="lenet", defense="critic", seed=0, epochs=3, data="mnist")
    row |= {"settings": settings, "checkpoint": "net-0.pt", "data": "mnist", "images": "3 images", "test error %": 1.0}
    other = row | {"settings": settings | {"seed": 1}, "test error %": 2.0, "deepfool": math.nan, "failed": {"ddn": 7},
                   "length": torch.tensor([0.5, math.inf])}
    lines = "\n".join(evaluation.report([row, other], ["deepfool", "ddn"]))
    for part in ("net, 3 epochs ", "1.50±0.71 (0.93)", "nan±nan (0.288)", "net-0.pt: ddn failed on 7 images"):
        assert part in lines
    assert "(0.93)" not in "\n".join(evaluation.report([row | {"data": "drawn"}], ["deepfool", "ddn"]))
    evaluation.save_json(tmp_path / "a.json", [other])
    row, = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert row["deepfool"] is None and row["length"] == [0.5, None]

    x_train, y_train = torch.arange(8.0).view(8, 1, 1, 1), torch.tensor([1, 1, 0, 0, 2, 2, 2, 3])
    x = torch.tensor([0.4, 2.6, 5.1]).view(3, 1, 1, 1)  # 1 1 0 0 2: the nearer pair; 0 0 2 1 2, 2 2 2 3 0
    assert evaluation.vote(x, x_train, y_train).tolist() == [1, 0, 2]


def test_the_smallest_length_is_of_all_attacks_but_the_papers(monkeypatch):
    lengths = {"deepfool": [3.0, 1.1, math.inf], "paper": [0.1, 0.1, 0.1], "ddn": [4.0, 1.0, math.inf]}
    monkeypatch.setattr(evaluation, "measure", lambda f, x, y, attack, title: dict(
        length=torch.tensor(lengths[title.strip()]), x_adv=x, rho=0.5, failed=1, seconds=2.0))
    x, y = torch.ones(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64)
    row = evaluation.evaluate(linear(2).float(), x, y, list(lengths), x[[0] * 5], y[[0] * 5], "")
    assert row["length"].tolist() == [3, 1, math.inf] and row["rho"] == (3 + 1) / 2 / 8  # each image's norm is 8


def test_pictures(tmp_path):
    page = torch.cat([torch.randint(256, (5, 7)) / 255, torch.tensor([[1, 1.01, -0.01, 0, 0, 0, 0.5]])])
    evaluation.save_png(str(tmp_path / "page.png"), page)
    content = (tmp_path / "page.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", content[16:24]) == (7, 6)
    assert content.endswith(b"\0\0\0\0IEND\xaeB`\x82")  # a chunk: length, kind, content, checksum
    lines = zlib.decompress(content[content.index(b"IDAT") + 4:-16])
    values = [list(lines[i + 1:i + 8]) for i in range(0, 48, 8)]
    assert values[:5] == (255 * page[:5]).round().int().tolist() and values[5] == [255, 255, 0, 0, 0, 0, 128]

    length = torch.tensor([0.0, 0.5, 1.25, math.inf])
    rows = [{"settings": {"defense": name}, "length": length} for name in ("critic", "at")]
    evaluation.save_svg(tmp_path / "curve.svg", "MLP", rows)
    svg = xml.etree.ElementTree.parse(tmp_path / "curve.svg").getroot()
    curves = {line.get("stroke-width"): line.get("points") for line in svg.findall(".//{*}polyline")}
    points = dict(point.split(",") for point in curves["6"].split())
    assert [points[x] for x in ("70", "142", "150", "470")] == ["135.0", "135.0", "215.0", "295.0"]  # 75, 75, 50, 25%
    ends = sorted(float(text.get("y")) for text in svg.findall(".//{*}text") if text.get("x") == "478")
    assert len(ends) == 2 and ends[1] - ends[0] >= 22

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
    with pytest.raises(ValueError, match="an image of each class"):
        evaluation.figure_2(f, x[1:], y[1:], x, y)


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
    (tmp_path / where).mkdir(parents=True, exist_ok=True)
    for name, content in small[0].items():
        (tmp_path / where / (name + ending)).write_bytes(gzip.compress(content) if ending else content)
    x_train, y_train, x_test, y_test = data.load_mnist(tmp_path, mirrors=())
    for found, expected in zip((x_train[:, 0] * 255, y_train, x_test[:, 0] * 255, y_test), small[1], strict=True):
        assert torch.equal(found.round().long(), expected)


@pytest.mark.parametrize("breaking, says", [
    (lambda c: c[:-5], "it has 107 bytes"), (lambda c: c[:-1] + bytes([c[-1] ^ 1]), "not the published SHA-256"),
    (lambda c: gzip.compress(c)[:-9], "archive is broken"), (lambda c: b"<html>log in", "<html>")])
def test_broken_files_are_refused_by_name(small, tmp_path, breaking, says):
    name, content = next(iter(small[0].items()))
    (tmp_path / name).write_bytes(breaking(content))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} is not MNIST's {name}: ") + f".*{says}"):
        data.load_mnist(tmp_path, mirrors=())


def test_download(small, tmp_path, capsys, monkeypatch):
    (files, tensors), name = small, "train-images-idx3-ubyte"
    for folder, pages in (("good", files), ("html", {name: b"<html>log in</html>"})):
        (tmp_path / folder).mkdir()
        for page, content in pages.items():
            (tmp_path / folder / f"{page}.gz").write_bytes(content)
    bad = [f"{tmp_path.as_uri()}/{folder}/" for folder in ("missing", "html")]
    x_train, *_ = data.load_mnist(tmp_path / "new", mirrors=[*bad, f"{tmp_path.as_uri()}/good/"])
    assert torch.equal(x_train[:, 0], tensors[0] / 255)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(f"{page}.gz" for page in files)
    monkeypatch.setattr(data.load_mnist, "__defaults__", (None, bad))
    assert train.main(["--data-dir", str(tmp_path / "none"), "--out", str(tmp_path / "run.pt")]) == 2
    error = capsys.readouterr().err
    for part in ("none", "No such file", "<html>", "--data drawn", *bad):
        assert part in error
    assert len(error.splitlines()) <= 10 and not (tmp_path / "none").exists()


def test_drawn_digits():
    (x, y), again, (x_other, _) = (data.drawn_digits(300, seed) for seed in (3, 3, 4))
    assert x.shape == (300, 1, 28, 28) and x.dtype == torch.float32 and x.min() == 0 and x.max() == 1
    assert y.dtype == torch.int64 and y.unique().tolist() == list(range(10))
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(x, x_other)


# --- The scripts, as a user runs them -----------------------------------------------------------------------------

TINY = "--data drawn --train-images 100 --device cpu".split()
REFERENCE = ["--arch", "mlp", "--defense", "reference", "--epochs", "1", *TINY]
BRIEF = ["--n", "3", "--attacks", "deepfool", "--device", "cpu"]
drawn = functools.lru_cache(data.drawn_digits)


def tiny():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, 10))


def save_tiny(path, f=None, **settings):
    """A checkpoint of weights alone, in float16."""
    settings = {"arch": "mlp", "defense": "critic", "seed": 0, "data": "drawn", "epochs": 1, **settings}
    torch.save({"settings": settings, "f": tiny().half().state_dict() if f is None else f}, path)


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """For train.main and eval.main in this process: a folder, digits that are drawn only once, small networks."""
    monkeypatch.setattr(data, "drawn_digits", drawn)
    monkeypatch.setitem(evaluation.NETWORKS, "mlp", tiny)
    monkeypatch.setattr(train, "critic", lambda: nn.Sequential(*tiny(), GaussianNoise(0.5)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
    return [{name: value for name, value in row.items() if name != "seconds"}
            for row in csv.DictReader(Path(path).read_text().splitlines())]


def test_both_scripts_end_to_end(tmp_path):
    """As subprocesses: a clean screen, the files where they are said to be, the command that is printed, as pasted."""
    run = functools.partial(subprocess.run, capture_output=True, text=True, cwd=tmp_path)
    name = "mlp-critic-quick-drawn-0"
    done = run([sys.executable, HERE / "train.py", "--arch", "mlp", "--quick", "--epochs", "1", *TINY])
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {f"{name}.pt", f"{name}.csv"}
    assert [row["epoch"] for row in log_of(tmp_path / f"runs/{name}.csv")] == ["0", "1"]
    command = done.stdout.splitlines()[-1].removeprefix("Done. On the test set: python ").split()
    done = run([sys.executable, HERE / command[0], command[1], *BRIEF, "--json", "a.json"])
    assert (done.returncode, done.stderr) == (0, "")
    row, = json.loads((tmp_path / "a.json").read_text())
    assert len(row["length"]) == 3 and f"{row['rho']:.3f}" in done.stdout and "3 drawn test images" in done.stdout


def test_resume_equals_uninterrupted(scripts, monkeypatch, capsys):
    """Bit for bit; and from a machine where torch cannot fuse Adam to one where it can, and back."""
    flags = ["--arch", "mlp", "--epochs", "2", *TINY, "--train-images", "200", "--out"]
    assert train.main([*flags, "whole.pt"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "step", interrupted(train.step, 1, 7))  # in the middle of the first and last epoch
        for more, says in (([], "no epoch is finished yet"), (["--resume"], "goes on after the last whole epoch")):
            assert train.main([*flags, "parts.pt", *more]) == 130 and says in capsys.readouterr().err
        for says in ("Resumed after epoch 1 of 2", "Resumed after epoch 2 of 2"):  # the second time nothing is left
            assert train.main([*flags, "parts.pt", "--resume"]) == 0 and says in capsys.readouterr().out
    whole, parts = (torch.load(name, weights_only=True) for name in ("whole.pt", "parts.pt"))
    for name in ("f", "D", "confidence"):
        torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=0)
    assert log_of("whole.csv") == log_of("parts.csv") and len(log_of("parts.csv")) == 3
    Path("log.csv").touch()
    torch.save({name: whole[name] for name in ("settings", "log", "f")}, "weights.pt")
    for more, says in {"parts.pt": "parts.pt is there already", "log.pt": "log.csv is there already",
                       "weights.pt --resume": "weights.pt holds weights alone", "no.pt --resume": "no.pt is not there",
                       "parts.pt --resume --lam 3": "lam 0.5", "parts.pt --resume --arch lenet": "arch mlp"}.items():
        assert train.main([*flags, *more.split()]) == 2 and says in capsys.readouterr().err

    def plain(*arguments, fused=False, real=torch.optim.Adam, **options):
        if fused:
            raise RuntimeError("cannot fuse")
        return real(*arguments, **options)
    for first, then in ((torch.optim.Adam, plain), (plain, torch.optim.Adam)):
        name = f"{first.__name__}.pt"
        with monkeypatch.context() as patch:
            patch.setattr(train, "step", interrupted(train.step, 5))
            patch.setattr(torch.optim, "Adam", first)
            assert train.main([*flags, name]) == 130
            patch.setattr(torch.optim, "Adam", then)
            assert train.main([*flags, name, "--resume"]) == 0
        torch.testing.assert_close(torch.load(name, weights_only=True)["f"], whole["f"], rtol=0.01, atol=1e-3)


def test_eval_whatever_happens(scripts, monkeypatch, capsys):
    """A pattern is expanded; what is finished is saved and printed after Ctrl-C and on a full disk; nothing that exists
    is overwritten."""
    for seed in (0, 1):
        os.makedirs(f"runs/{seed}")
        save_tiny(f"runs/{seed}/net-{seed}.pt", seed=seed)
    flags = ["runs/**/*.pt", *BRIEF, "--json", "new/a.json"]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", interrupted(evaluation.evaluate, 2))
        assert evaluation.main(flags) == 130 and len(json.loads(Path("new/a.json").read_text())) == 1
        patch.setattr(evaluation, "evaluate", lambda *arguments: pytest.fail("the first attack has begun"))
        save_tiny("net-0.pt", data="mnist")
        said = capsys.readouterr()
        for other, says in ((flags, "new/a.json is there already"), (["net-0.pt", *flags[:-2]], "choose with --data")):
            assert evaluation.main(other) == 2 and says in capsys.readouterr().err and "Table 1" in said.out
    with monkeypatch.context() as patch:
        patch.setattr(data, "replace", lambda *arguments: (_ for _ in ()).throw(OSError("no space left")))
        assert evaluation.main([*flags[:-1], "full.json"]) == 2
        said = capsys.readouterr()
        assert "no space left" in said.err and "Table 1" in said.out
    assert evaluation.main(["runs/*/net-?.pt", *BRIEF, "--figures", "pictures"]) == 0
    pictures = [f"figure{i}-net-{seed}.png" for i in (2, 4) for seed in (0, 1)]
    assert sorted(os.listdir("pictures")) == ["accuracy-mlp.svg", *pictures]


def test_what_is_evaluated(scripts, monkeypatch):
    """The error over the whole test set, attacks on the first n of one permutation, the vote by what is trained on; and
    in float32, in training too, though something has switched TF32 on."""
    save_tiny("net.pt", data="mnist")
    seen, y_train, y = [], torch.arange(20000, 30300), torch.arange(10000)
    monkeypatch.setattr(data, "load", lambda *source: seen.append(source) or (y_train / 30300, y_train, y / 10000, y))
    monkeypatch.setattr(evaluation, "error_rate", lambda f, x, y: seen.append(y) or 0)
    monkeypatch.setattr(evaluation, "evaluate", lambda f, *arguments: seen.extend(arguments) or {})
    monkeypatch.setattr(evaluation, "report", lambda *arguments: [])
    monkeypatch.setattr(train, "train", lambda *arguments: None)
    for main, flags in ((evaluation.main, ["net.pt", "--n", "5"]), (train.main, ["--arch", "mlp"])):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        torch.set_float32_matmul_precision("high")
        assert main([*flags, "--device", "cpu"]) == 0
        assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
    source, whole, x, some, _, x_near, y_near, *_ = seen
    assert source == ("mnist", None) and torch.equal(whole, y)
    assert some.tolist() == [6044, 2890, 9399, 1917, 4919] and torch.equal(x, some / 10000)
    assert torch.equal(y_near, y_train[10000:]) and torch.equal(x_near, y_near / 30300)


def test_the_changing_line_of_a_terminal(scripts, monkeypatch):
    save_tiny("net.pt")
    for main, flags, says in (
            (train.main, [*REFERENCE, "--train-images", "300", "--out"], r"epoch 1: step 2 of 3, .* minutes left"),
            (evaluation.main, ["net.pt", *BRIEF, "--n", "60", "--json"], r"net\.pt deepfool: image 0 of \d")):
        for name, terminal in (("a.pt", True), ("b.pt", False)):
            stderr = io.StringIO()
            stderr.isatty = lambda terminal=terminal: terminal
            monkeypatch.setattr(sys, "stderr", stderr)
            assert main([*flags, f"{main.__module__}-{name}"]) == 0
            assert bool(re.search(says, stderr.getvalue())) == bool(stderr.getvalue()) == terminal


@pytest.mark.parametrize("loss, says", [
    (lambda run: torch.tensor(math.nan), "the loss is not finite in step 1 of epoch 2"),
    (lambda run: run.f[1].bias.data.fill_(math.inf).sign()[0], "a weight is not finite after epoch 2")])
def test_what_is_not_finite_ends_the_run(scripts, monkeypatch, capsys, loss, says):
    monkeypatch.setattr(train, "step", lambda run, epoch, x, y: {"loss": loss(run) if epoch > 1 else torch.ones(())})
    assert train.main([*REFERENCE, "--epochs", "2", "--out", "nan.pt"]) == 2 and says in capsys.readouterr().err
    assert [row["epoch"] for row in log_of("nan.csv")] == ["1"]
    assert evaluation.load_checkpoint("nan.pt")[1]["epochs"] == "1 of 2"


@pytest.mark.parametrize("command", [
    "train --arch vgg", "train --defense magic", "train --epochs 0", "train --epochs 1.5", "train --seed -1",
    "train --lam nan", "train --lambda-rec inf", "train --lambda-grad -1", "train --attack-steps 0",
    "train --target far", "train --data cifar", "train --device abacus", "train --train-images 99",
    "train --train-images 50001", "train --out runs/lam0.5", "train --defense reference --lam 0.1", "train --quic",
    "eval", "eval x.pt --n 0", "eval x.pt --n 10001", "eval x.pt --attacks magic", "eval a/x.pt b/x.pt --figures d"])
def test_wrong_flags(scripts, capsys, command):
    script, *flags = command.split()
    with pytest.raises(SystemExit) as error:
        {"train": train.main, "eval": evaluation.main}[script](flags)
    named = ["CHECKPOINT", *(flag for flag in flags if flag.startswith("--"))][-1]
    assert error.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]  # above it stands the usage
    assert list(scripts.iterdir()) == []


@pytest.mark.parametrize("f, damage", [
    (type("Trap", (), {"__reduce__": lambda _: (os.mkdir, ("trapped",))})(), lambda c: c),  # code that makes a folder
    (None, lambda c: c[:-5000]), (None, lambda c: b"text"), (lenet().state_dict(), lambda c: c)])
def test_bad_and_missing_checkpoints_are_refused_by_name(scripts, capsys, f, damage):
    save_tiny("bad.pt", f)
    Path("bad.pt").write_bytes(damage(Path("bad.pt").read_bytes()))
    for name in ("bad.pt", "missing.pt"):
        assert evaluation.main([name]) == 2
        assert train.main(["--out", name, "--resume", "--arch", "mlp", *TINY]) == 2
        error = capsys.readouterr().err
        assert error.count(name) >= 2 and len(error.splitlines()) == 2 and "Traceback" not in error
    assert not Path("trapped").exists()


# --- What is shipped and what README says -------------------------------------------------------------------------

@pytest.mark.skipif(not os.environ.get("MNIST_DIR"), reason="MNIST_DIR is not set to the folder of MNIST's four files")
def test_mnist_is_mnist_and_the_shipped_networks_err_as_often_as_measured():
    x_train, y_train, x, y = data.load_mnist()
    assert x_train.shape == (60000, 1, 28, 28) and x.shape == (10000, 1, 28, 28) and y_train.dtype == torch.int64
    assert x_train.min() == 0 and x_train.max() == 1 and x_train.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert y_train[:9].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1] and y[:5].tolist() == [7, 2, 1, 0, 4]
    for row in (row for arch in ("lenet", "mlp") for row in json.loads((HERE / f"results/{arch}.json").read_text())):
        f, settings = evaluation.load_checkpoint(HERE / row["checkpoint"])
        assert settings == row["settings"]
        assert 100 * evaluation.error_rate(f, x, y) == pytest.approx(row["test error %"], abs=0.001), row["checkpoint"]


def test_the_examples_of_readme(scripts):
    os.mkdir("results")
    f, names = lenet(), {}
    save_tiny("results/lenet-critic.pt", f.state_dict(), arch="lenet")
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2 and names["parts"]["success"] > 0
    torch.testing.assert_close(names["net"](names["x"]), f(names["x"]))


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_every_command_parses(name):
    found = re.findall(r"^ +python (train|eval)\.py([^#;\n]*)", (HERE / name).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(found) > 1
    for script, flags in found:
        {"train": train, "eval": evaluation}[script].parse_flags(flags.split())

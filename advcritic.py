"""Improved Network Robustness with Adversary Critic (Matyasko and Chau, NIPS 2018): the method, and only the method.

    x       images (N,1,28,28), float in [0,1]        f   classifier, images -> logits (N,K)
    y       labels (N,)                               D   critic, images -> logits (N,K)
    x_adv   A_f(x; target), the attacked images       C   confidence that the attack must reach (N,)
    target  class that the attack aims at (N,)        k   class that f gives to x_adv (N,)

Headings name the item of the paper and stand in its order, Section 4 from Figure 3 to the target and the confidence,
then the two networks of Section 5. The critic estimates the distance between natural and attacked images of Eq. 3.
One training step is: RunningConfidence.update, closest_class, attack, critic_loss; then classifier_loss through the
same x_adv (train.py). README lists the constants that the paper does not print.

Signs: Eqs. 4 and 5 as printed read D_k as the probability that an image is adversarial, with an unbounded loss. Here
D_k = sigmoid(logit k) is the probability that x is natural data of class k, with the usual cross-entropy: the critic
maximises log D_y(x) + log(1 - D_k(x_adv)), and the classifier minimises -log D_k(x_adv). With the logit s these are
softplus(-s) = -log sigmoid(s) and softplus(s) = -log(1 - sigmoid(s)).
"""
import torch
import torch.nn.functional as F
from torch import nn


# --- Figure 3: the multiclass adversary critic --------------------------------------------------------------------

class GaussianNoise(nn.Module):
    """Adds N(0, std^2) noise to any tensor in training mode; the identity in eval mode (Section 5)."""

    def __init__(self, std):
        super().__init__()
        self.std = std

    def forward(self, x):
        return x + self.std * torch.randn_like(x) if self.training else x


def he_normal(net):
    """Initialises every Linear and Conv2d of net in place: weights N(0, 2 / fan-in), biases 0. Returns net."""
    for layer in net.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return net


def critic():
    """D: images (N,1,28,28) -> logits (N,10); logit k scores "natural data of class k" (Figure 3, Section 5).

    784-1200-1200-10, leaky ReLU 0.2, noise on the input of each layer: std 0.1 on the image, 0.5 on each hidden
    activation. The label enters only by choosing the output.
    """
    return he_normal(nn.Sequential(
        nn.Flatten(),
        GaussianNoise(0.1), nn.Linear(784, 1200), nn.LeakyReLU(0.2),
        GaussianNoise(0.5), nn.Linear(1200, 1200), nn.LeakyReLU(0.2),
        GaussianNoise(0.5), nn.Linear(1200, 10)))


# --- Eq. 4: the critic's objective, with the gradient norm penalty ------------------------------------------------

def gradient_penalty(score, x):
    """mean_i (|grad_x score_i|_2 - 1)^2, a differentiable scalar (Section 4, after Gulrajani et al. 2017).

    score (N,) must have been computed from x, which requires grad; image i may influence score i only.
    """
    grad, = torch.autograd.grad(score.sum(), x, create_graph=True)
    norm = (grad.flatten(1).square().sum(1) + 1e-12).sqrt()  # 1e-12: the root has no derivative at 0
    return (norm - 1).square().mean()


def critic_loss(D, x, y, x_adv, y_adv, lambda_grad=10.0):
    """Eq. 4, minimised by D; a scalar:

    mean softplus(-D_y(x)) + mean softplus(D_k(x_adv)) + lambda_grad (penalty(D_y, x) + penalty(D_k, x_adv))

    x, x_adv (N,...) images, both detached; y (N,) true labels; y_adv (N,) the class k that f gives to x_adv, which is
    that of x where the attack failed: the critic sees these images too. The penalty is taken at x and at x_adv, not
    between them, and on the very logits of the first two terms, so that it sees the same draw of the critic's noise.
    """
    x, x_adv = x.detach().requires_grad_(), x_adv.detach().requires_grad_()
    real = D(x).gather(1, y[:, None]).squeeze(1)
    fake = D(x_adv).gather(1, y_adv[:, None]).squeeze(1)
    penalty = gradient_penalty(real, x) + gradient_penalty(fake, x_adv)
    return F.softplus(-real).mean() + F.softplus(fake).mean() + lambda_grad * penalty


# --- Eq. 5 and Eq. 6: the classifier's objective, with the cycle-consistency term ---------------------------------

def classifier_loss(f, D, x, y, x_adv, lam, lambda_rec=0.01, steps=5):
    """Eq. 5 + Eq. 6, minimised by f:

    mean NLL(x, y) + lam mean softplus(-D_k(x_adv)) + lambda_rec mean |x_rec - x|_2^2,
    x_rec = A_f(x_adv; the class of x), to the confidence that f has in this class at x

    x (N,...) images, y (N,) labels, x_adv what attack(f, x, ..., create_graph=True) made of x with the same f;
    lam is 0.5 for the MLP and 0.1 for LeNet; steps of the attack back. The second and third mean run over the images
    whose attack changed the prediction (y != y_k in the paper); both are 0 where there is none.

    Returns the scalar, and a dict of its detached parts: nll, fool, cycle (before their weights) and success, the
    share of the images whose attack changed the prediction.
    """
    logits = f(x)
    nll = F.cross_entropy(logits, y)
    probability, predicted = logits.softmax(1).max(1)
    with torch.no_grad():
        k = f(x_adv).argmax(1)
    moved = k != predicted

    def mean_moved(value):  # by weights, not by boolean indexing: static shapes and no host read, for a CUDA graph
        return torch.where(moved, value, 0).sum() / moved.sum().clamp(min=1)

    # The gradient of `fool` runs through D (whose weights stay put: train.minimise) and x_adv into the attack and f.
    fool = mean_moved(F.softplus(-D(x_adv).gather(1, k[:, None]).squeeze(1)))
    # The way back starts from x_adv as a constant, so this term trains A_f at x_adv. Its confidence is not detached,
    # as in the released code, so it trains f at x as well; detaching it changes this gradient by about a third.
    # Eq. 6 prints |.|_2; the released code, where lambda_rec = 0.01 comes from, squares it, and so do we.
    x_rec = attack(f, x_adv.detach(), predicted, probability, steps, create_graph=True)
    cycle = mean_moved((x_rec - x).flatten(1).square().sum(1))

    parts = dict(nll=nll, fool=fool, cycle=cycle, success=moved.to(nll.dtype).mean())
    return nll + lam * fool + lambda_rec * cycle, {name: part.detach() for name, part in parts.items()}


# --- Eq. 7 and Algorithm 1: the attack ----------------------------------------------------------------------------

def attack(f, x, target, confidence, steps=5, overshoot=0.05, max_step=None, box=None, create_graph=False):
    """A_f(x; target), Algorithm 1: x_adv to which f gives the target's class a probability of at least C = confidence.

    From r = 0, `steps` times, at x_i = x + (1 + overshoot) r, with p the target's probability at x_i, l = log p,
    w = grad_x l, n = sqrt(eps + |w|^2) and eps = 1e-8:
        r_i = (sqrt(eps) + |log C - l| / n) (w / n)     Eq. 7 is the length |log C - l| / |w|, w / |w| the direction
        r  += r_i  prod_{j<=i} 1[p(x_j) < C]            an image that reached C stays where it is

    x (N,...) images, target (N,), confidence in (0,1], a float or (N,); f any callable, images -> logits (N,K).
    overshoot and sqrt(eps) take the linearised step across its goal. max_step cuts |r_i|_2, before the overshoot.
    box = (low, high) clamps each x_i; then an image must also be classified as the target before it stops, and
    leaves the computation when it does. The paper trains with 5 steps and tests with 500 of at most 0.1, in the box.

    Returns x_adv (N,...), detached unless create_graph, in which case it carries a gradient to f's weights and to
    confidence. An attack that fails keeps its last iterate. create_graph keeps `steps` passes of f in memory.
    """
    x, eps = x.detach(), 1e-8
    C = torch.as_tensor(confidence, dtype=x.dtype, device=x.device).expand(len(x))
    C = C if create_graph else C.detach()
    x_adv, go = x, torch.ones_like(C)
    for _ in range(steps):
        live = slice(None) if box is None else go.nonzero().squeeze(1)
        if box is not None and len(live) == 0:
            break
        # Where the gradient stops. x_adv = x + (1 + overshoot) sum_i go_i r_i, and f's weights enter each summand in
        # two ways: through p, l and w, computed with the weights, and through the point x_i at which they are
        # computed, which the steps before it have reached with the same weights. We keep the first and cut the
        # second: x_i is detached, so each step is a differentiable function of the weights at a fixed point, and
        # the gradient of x_adv is the sum of the gradients of go_i r_i, each at its x_i. Keeping the second would
        # multiply every step's gradient with the Hessians of log p at all later points.
        # w is itself a gradient; create_graph makes it differentiable, which is the paper's d2f / dx dw.
        with torch.enable_grad():
            x_i = x_adv[live].detach().requires_grad_()
            logits = f(x_i)
            l = -F.cross_entropy(logits, target[live], reduction="none")
            w, = torch.autograd.grad(l.sum(), x_i, create_graph=create_graph)  # of a sum: each image its own
        l, w = (l if create_graph else l.detach()), w.flatten(1)  # w (N,d)
        n = (eps + w.square().sum(1)).sqrt()
        r_i = ((eps ** 0.5 + (C[live].log() - l).abs() / n) / n)[:, None] * w
        if max_step is not None:
            r_i = r_i * (max_step / r_i.norm(dim=1, keepdim=True).clamp(min=max_step))
        # The indicator 1[p < C] has no gradient. Sigmoid-adjusted straight-through estimator: its value is
        # round(sigmoid(C - p)), its gradient is the sigmoid's.
        s = torch.sigmoid(C[live] - l.exp())
        below = s + (s.round() - s).detach()
        if box is not None:
            below = torch.where(logits.argmax(1) == target[live], below, 1)
        go_i = go[live] * below
        step = (1 + overshoot) * (go_i[:, None] * r_i).view_as(x_i)
        if box is None:
            go, x_adv = go_i, x_adv + step
        else:
            go, x_adv = go.index_copy(0, live, go_i), x_adv.index_copy(0, live, (x_adv[live] + step).clamp(*box))
    return x_adv


# --- Section 4: the attack's target and its confidence ------------------------------------------------------------

def boundaries(f, x, label):
    """The boundaries between label and every class k, f linearised at x (DeepFool, Moosavi-Dezfooli et al. 2016):

    distance (N,K) |f_k - f_label| / |w_k|_2, infinite at k = label;   w (N,K,d) grad f_k - grad f_label
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = f(x)
        w = torch.stack([torch.autograd.grad(logits[:, k].sum(), x, retain_graph=True)[0].flatten(1)
                         for k in range(logits.shape[1])], 1)
    logits, w = logits.detach(), w - w[torch.arange(len(x), device=x.device), label][:, None]
    distance = (logits - logits.gather(1, label[:, None])).abs() / w.norm(dim=2).clamp(min=1e-12)
    return distance.scatter(1, label[:, None], float("inf")), w


def closest_class(f, x, label):
    """The class (N,) other than label with the closest decision boundary, DeepFool's criterion at x (Section 4):

    argmin_{k != label} |f_k(x) - f_label(x)| / |grad f_k(x) - grad f_label(x)|_2

    x (N,...) images, label (N,): in training the class that f predicts. f any callable, images -> logits (N,K).
    """
    return boundaries(f, x, label)[0].argmin(1)


class RunningConfidence(nn.Module):
    """The running mean, per class, of the classifier's confidence on natural images (Section 4); C = mean[target].

    mean (K,) starts at 1 and is a constant for the gradient. It is a buffer, so that it is saved with state_dict()
    and follows .to(device).
    """

    def __init__(self, num_classes):
        super().__init__()
        self.register_buffer("mean", torch.ones(num_classes))

    @torch.no_grad()
    def update(self, logits):
        """mean[k] <- 0.5 mean[k] + 0.5 (mean probability of k over the images predicted as k), from natural images'
        logits (N,K). A class that no image is predicted as keeps its value."""
        probability, label = logits.softmax(1).max(1)
        is_k = label[:, None] == torch.arange(len(self.mean), device=label.device)  # (N,K)
        batch_mean = (is_k * probability[:, None]).sum(0) / is_k.sum(0).clamp(min=1)
        self.mean.copy_(torch.where(is_k.any(0), 0.5 * self.mean + 0.5 * batch_mean, self.mean))


# --- Section 5: the two classifiers -------------------------------------------------------------------------------

def mlp():
    """The fully connected network of Table 1a: images (N,1,28,28) -> logits (N,10); 784-1200-1200-1200-10, ReLU."""
    return he_normal(nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 1200), nn.ReLU(),
        nn.Linear(1200, 1200), nn.ReLU(),
        nn.Linear(1200, 1200), nn.ReLU(),
        nn.Linear(1200, 10)))


def lenet():
    """LeNet-5 of Table 1b: images (N,1,28,28) -> logits (N,10); two 5x5 convolutions with pooling, two dense."""
    return he_normal(nn.Sequential(
        nn.Conv2d(1, 32, 5), nn.MaxPool2d(2), nn.ReLU(),   # (N,32,12,12); the function and the gradients are those of
        nn.Conv2d(32, 64, 5), nn.MaxPool2d(2), nn.ReLU(),  # (N,64,4,4)    ReLU before pooling, on a quarter the values
        nn.Flatten(),
        nn.Linear(1024, 512), nn.ReLU(),
        nn.Linear(512, 10)))

"""Improved Network Robustness with Adversary Critic (Matyasko and Chau, NIPS 2018): the method, in the paper's order.

    x       images (N,...), float32 or float64       f      the classifier, images -> logits (N,K)
    y       their labels (N,), int64                 D      the critic, images -> logits (N,K)
    target  the class that the attack aims at (N,)   C      the confidence that the attack must reach (N,)
    x_adv   the attacked images A_f(x; target)       y_adv  the class that f gives to x_adv (N,)

f must treat each image on its own and without randomness: batch norm and dropout in eval mode.

Signs: as printed, Eqs. 4 and 5 read D_k as the probability that an image is adversarial, and have no minimum.
Here D_k = sigmoid(logit k) is the probability that x is natural data of class k, and the loss is cross-entropy, as in
the authors' code: the critic maximises log D_y(x) + log(1 - D_y_adv(x_adv)), the classifier minimises
-log D_y_adv(x_adv). For a logit s, -log sigmoid(s) = softplus(-s) and -log(1 - sigmoid(s)) = softplus(s).
"""
import torch
import torch.nn.functional as F
from torch import nn


# --- Figure 3 and Section 5: the critic and the two classifiers, images (N,1,28,28) -> logits (N,10) --------------

class GaussianNoise(nn.Module):
    """Adds N(0, std^2) noise in training mode; the identity in eval mode."""

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
    """D: logit k scores "natural data of class k". The label enters only by choosing the output (Figure 3). The amount
    of noise, the slope 0.2 and the initialisation are from the authors' code."""
    return he_normal(nn.Sequential(
        nn.Flatten(),
        GaussianNoise(0.1), nn.Linear(784, 1200), nn.LeakyReLU(0.2),
        GaussianNoise(0.5), nn.Linear(1200, 1200), nn.LeakyReLU(0.2),
        GaussianNoise(0.5), nn.Linear(1200, 10)))


def mlp():
    """The fully connected network of Table 1a."""
    return he_normal(nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 1200), nn.ReLU(),
        nn.Linear(1200, 1200), nn.ReLU(),
        nn.Linear(1200, 1200), nn.ReLU(),
        nn.Linear(1200, 10)))


def lenet():
    """LeNet-5 of Table 1b, its widths from the authors' code. Max-pooling and ReLU commute."""
    return he_normal(nn.Sequential(
        nn.Conv2d(1, 32, 5), nn.MaxPool2d(2), nn.ReLU(),   # (N,32,12,12)
        nn.Conv2d(32, 64, 5), nn.MaxPool2d(2), nn.ReLU(),  # (N,64,4,4)
        nn.Flatten(),
        nn.Linear(1024, 512), nn.ReLU(),
        nn.Linear(512, 10)))


# --- Eq. 4: the critic's objective, with the gradient norm penalty ------------------------------------------------

def gradient_penalty(score, x):
    """mean_i (|grad_x score_i|_2 - 1)^2 (Section 4, after Gulrajani et al. 2017); score (N,) was computed from x."""
    grad, = torch.autograd.grad(score.sum(), x, create_graph=True)
    norm = (grad.flatten(1).square().sum(1) + 1e-12).sqrt()  # 1e-12: the root has no derivative at 0
    return (norm - 1).square().mean()


def critic_loss(D, x, y, x_adv, y_adv, lambda_grad=10.0):
    """Eq. 4, which D minimises. With s_k the critic's logit k:

    mean softplus(-s_y(x)) + mean softplus(s_y_adv(x_adv)) + lambda_grad (penalty(s_y, x) + penalty(s_y_adv, x_adv))

    y_adv replaces the paper's target y_k. The means run over the whole batch, failed attacks included; Eq. 4 takes each
    class k separately. x and x_adv are detached. The penalty is taken at x and at x_adv, not in between. Each
    half reuses the forward pass of its loss term, and thus its noise.
    """
    x, x_adv = x.detach().requires_grad_(), x_adv.detach().requires_grad_()
    real = pick(D(x), y)
    fake = pick(D(x_adv), y_adv)
    penalty = gradient_penalty(real, x) + gradient_penalty(fake, x_adv)
    return F.softplus(-real).mean() + F.softplus(fake).mean() + lambda_grad * penalty


# --- Eq. 5 and Eq. 6: the classifier's objective, with the cycle-consistency term ---------------------------------

def classifier_loss(f, D, x, y, x_adv, y_adv, lam, lambda_rec=0.01, steps=5):
    """Eq. 5 + Eq. 6, which f minimises. With s_k the critic's logit k:

    mean NLL(x, y) + lam mean softplus(-s_y_adv(x_adv)) + lambda_rec mean |x_rec - x|_2^2,
    x_rec = A_f(x_adv; the class that f gives to x), to the confidence that f has in this class at x

    x_adv = attack(f, x, ..., create_graph=True) with this f. The second and third mean run over the images whose attack
    changed the prediction, and are 0 if there is none. lam is 0.5 for the MLP and 0.1 for LeNet (Section 5). Returns
    the loss, and a dict of detached scalars: nll, fool, cycle (the three means), success (the share that changed).
    """
    logits = f(x)
    probability, predicted = logits.softmax(1).max(1)
    success = y_adv != predicted

    nll = F.cross_entropy(logits, y)
    # The gradient of `fool` passes through D and x_adv into the attack, and through the attack into f.
    fool = mean_where(success, F.softplus(-pick(D(x_adv), y_adv)))
    # Here x_adv is a constant, so that only the attack back to x is differentiated. The confidence of this attack is
    # not a constant: through `probability` the cycle term also trains f at the clean images. Both are as in the
    # authors' code. So is the square, which Eq. 6 does not print: their lambda_rec = 0.01 weighs the square.
    x_rec = attack(f, x_adv.detach(), predicted, probability, steps, create_graph=True)
    cycle = mean_where(success, (x_rec - x).flatten(1).square().sum(1))

    parts = dict(nll=nll, fool=fool, cycle=cycle, success=success.to(nll.dtype).mean())
    return nll + lam * fool + lambda_rec * cycle, {name: part.detach() for name, part in parts.items()}


def mean_where(mask, value):
    """The mean of value (N,) over the images for which mask (N,) is True; 0 if there is none. With value[mask], whose
    size depends on the data, the CPU would have to wait for the GPU."""
    return value.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


# --- Eq. 7 and Algorithm 1: one step of the attack, and the attack A_f --------------------------------------------

def attack_step(f, x, target, confidence, create_graph=False):
    """Eq. 7 at x: the shortest step r_i after which, to first order, the target's log-probability is log C. If the
    probability is above C already, the step still goes towards the target: whoever calls this decides when to stop.

    r_i = (sqrt(eps) + |log C - log p| / n) w / n,   w = grad_x log p,   n = sqrt(eps + |w|^2),   eps = 1e-8

    Eq. 7 prints the length (log C - log p) / |w|; the direction is w / |w|. With eps a step stays finite where w is 0.
    C = confidence, a float in (0,1] (ValueError if not) or (N,); x is a constant. Returns r_i (N,...) and, at x, the
    target's probability p (N,) and f's logits (N,K). They are detached, unless create_graph keeps them differentiable
    with respect to f's weights, and r_i also with respect to C.
    """
    if not isinstance(confidence, torch.Tensor) and not 0 < confidence <= 1:
        raise ValueError(f"confidence: {confidence}, expected a probability in (0,1]")
    eps = 1e-8  # as in the authors' code
    C = torch.as_tensor(confidence, dtype=x.dtype, device=x.device)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = f(x)
        log_p = pick(logits.log_softmax(1), target)
        # The gradient of the sum holds each image's own gradient. With create_graph, this gradient can itself be
        # differentiated by f's weights: the paper's second-order term d2f / dx dw, whose w stands for the weights.
        w, = torch.autograd.grad(log_p.sum(), x, create_graph=create_graph)
        if not create_graph:
            C, log_p, logits = C.detach(), log_p.detach(), logits.detach()
        n = (eps + w.flatten(1).square().sum(1)).sqrt()
        length = eps ** 0.5 + (C.log() - log_p).abs() / n
        return broadcast(length / n, w) * w, log_p.exp(), logits


def attack(f, x, target, confidence, steps=5, overshoot=0.05, create_graph=False):
    """A_f(x; target), Algorithm 1: moves x until f gives the target a probability of at least confidence.

    From r = 0, `steps` times:   r += r_i 1[p(x_0) < C] ... 1[p(x_i) < C],   r_i by Eq. 7 at x_i = x + (1 + overshoot) r
    x_adv = x + (1 + overshoot) r,   not clipped to [0,1]

    C = confidence in (0,1], a float or (N,). An image that reached C stays where it is; an attack that fails keeps its
    last iterate. x_adv is detached, unless create_graph makes it a function of f's weights and of C; then the graphs of
    all steps stay in memory. The form that the paper tests with is eval.high_confidence_attack.
    """
    x = x.detach()
    r, indicator = torch.zeros_like(x), x.new_ones(len(x))
    C = torch.as_tensor(confidence, dtype=x.dtype, device=x.device)
    with torch.set_grad_enabled(create_graph):
        for _ in range(steps):
            # The gradient stops at x_i, a constant. f's weights determine r_i and p at x_i: this is differentiated.
            # Through the earlier steps they also determined x_i itself: this is not differentiated. Otherwise the
            # gradient of each step would be multiplied by the Jacobians of all later steps, with Hessians of log p.
            x_i = (x + (1 + overshoot) * r).detach()
            r_i, p, _ = attack_step(f, x_i, target, confidence, create_graph)
            # The straight-through estimator: the sum has the value s.round() = 1[p < C], and the gradient of s.
            s = torch.sigmoid(C - p)
            indicator = indicator * (s + (s.round() - s).detach())
            r = r + broadcast(indicator, x) * r_i
        return x + (1 + overshoot) * r


# --- Section 4: the attack's target and its confidence ------------------------------------------------------------

def boundaries(f, x, label):
    """The boundary between label and each class k, if f were linear around x (DeepFool, Moosavi-Dezfooli et al. 2016).

    Returns norm (N,K) = |grad f_label - grad f_k|_2 and distance (N,K) = |f_label - f_k| / norm, which is infinite at
    k = label. Both are detached.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = f(x)
        gap = pick(logits, label)[:, None] - logits
        # One class at a time, so that memory does not grow with K.
        grads = (torch.autograd.grad(gap_k.sum(), x, retain_graph=True)[0] for gap_k in gap.unbind(1))
        norm = torch.stack([l2(grad) for grad in grads], 1)
    distance = gap.detach().abs() / norm.clamp(min=1e-12)
    return norm, distance.scatter(1, label[:, None], torch.inf)


def closest_class(f, x, label):
    """The class (N,) other than label with the closest decision boundary, DeepFool's criterion at x (Section 4):

    argmin_{k != label} |f_k(x) - f_label(x)| / |grad f_k(x) - grad f_label(x)|_2

    In training the label is the class that f predicts.
    """
    return boundaries(f, x, label)[1].argmin(1)


def uniform_class(f, x, label):
    """The paper's alternative: a class (N,) other than label, uniformly at random."""
    with torch.no_grad():
        K = f(x[:1]).shape[1]
    return (label + torch.randint_like(label, 1, K)) % K


class RunningConfidence(nn.Module):
    """The running mean, per class, of the classifier's confidence on natural images (Section 4). An attack towards
    class t takes C = mean[t]. mean (K,) starts at 1. It is a buffer, so that state_dict() and to(device) include it."""

    def __init__(self, num_classes):
        super().__init__()
        self.register_buffer("mean", torch.ones(num_classes))

    @torch.no_grad()
    def update(self, logits):
        """mean[k] <- 0.5 mean[k] + 0.5 (the mean probability of k over the images predicted as k), from the logits
        (N,K) of natural images. A class that no image is predicted as keeps its value."""
        probability, predicted = logits.softmax(1).max(1)
        is_k = predicted[:, None] == torch.arange(len(self.mean), device=logits.device)  # (N,K)
        batch_mean = probability[:, None].masked_fill(~is_k, 0).sum(0) / is_k.sum(0).clamp(min=1)
        self.mean.copy_(torch.where(is_k.any(0), 0.5 * self.mean + 0.5 * batch_mean, self.mean))


# --- Section 4: alternating minimisation of Eq. 4 and Eq. 5 -------------------------------------------------------

def train_step(f, D, confidence, adam_f, adam_D, x, y, lam, lambda_rec=0.01, lambda_grad=10.0, steps=5,
               choose_target=closest_class):
    """One training step of the classifier f and the critic D, in place, on a batch of images x in [0,1], labels y.

    confidence is a RunningConfidence, which is updated; adam_f and adam_D are the optimizers of f and of D; lam,
    lambda_rec and lambda_grad weigh `fool`, `cycle` and the penalty; an attack takes `steps` steps, and the one on x
    goes to choose_target(f, x, f's prediction). D needs as many outputs as f, and train mode, for its noise.
    Returns a dict of detached scalars: nll, fool, cycle and success as in classifier_loss, and critic, Eq. 4.
    Nothing is read back to the host.
    """
    with torch.no_grad():
        logits = f(x)
    if logits.shape != (len(x), len(confidence.mean)) or y.shape != (len(x),):
        raise ValueError(f"logits {tuple(logits.shape)}, labels {tuple(y.shape)} and {len(confidence.mean)} classes in "
                         f"confidence do not match {len(x)} images")
    confidence.update(logits)
    target = choose_target(f, x, logits.argmax(1))
    # Both losses share this x_adv: the critic's as a constant, the classifier's as a function of f's weights.
    x_adv = attack(f, x, target, confidence.mean[target], steps, create_graph=True)
    with torch.no_grad():
        y_adv = f(x_adv).argmax(1)

    # The critic, Eq. 4: maximise log D_y(x) + log(1 - D_y_adv(x_adv)), with the gradient norm penalty.
    loss_D = critic_loss(D, x, y, x_adv, y_adv, lambda_grad)
    minimise(loss_D, adam_D)

    # The classifier, Eq. 5 + Eq. 6: minimise NLL - lam log D_y_adv(x_adv) + lambda_rec |A_f(x_adv) - x|^2.
    loss_f, parts = classifier_loss(f, D, x, y, x_adv, y_adv, lam, lambda_rec, steps)
    minimise(loss_f, adam_f)
    return {**parts, "critic": loss_D.detach()}


def minimise(loss, optimizer):
    """One step of the optimizer. Only the optimizer's weights get a gradient, so that each loss trains one network."""
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if not weights:
        return  # this network is frozen
    optimizer.zero_grad()
    loss.backward(inputs=weights)
    if all(p.grad is None for p in weights):
        raise ValueError("the loss depends on none of the optimizer's weights: are they another network's?")
    optimizer.step()


# --- Small tools --------------------------------------------------------------------------------------------------

def pick(logits, k):
    """logits (N,K), k (N,) -> each image's logit of its class k, (N,)."""
    return logits.gather(1, k[:, None]).squeeze(1)


def broadcast(value, x):
    """value (N,) as (N,1,...,1): a number for each of the images x (N,...), to multiply or select them."""
    return value.view(-1, *[1] * (x.dim() - 1))


def l2(v):
    """|v|_2 of each image: v (N,...) -> (N,)."""
    return v.flatten(1).norm(dim=1)

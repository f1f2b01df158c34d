"""The baselines written out in NumPy on one matrix each: generators of A and B after every step, in float64.

Each takes A: (n, r), B: (r, m) and a list of pairs of gradients.
"""

import numpy as np


class Adam:
    """Moments of one matrix; returns the corrected moments."""

    def __init__(self, b1=0.9, b2=0.999):
        self.b1, self.b2, self.m, self.v, self.t = b1, b2, 0.0, 0.0, 0

    def __call__(self, g):
        self.t += 1
        self.m, self.v = self.b1 * self.m + (1 - self.b1) * g, self.b2 * self.v + (1 - self.b2) * g * g
        return self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)


def spec_lora_plus(a, b, grads, lr=1e-2, ratio=4.0, decay=0.1, eps=1e-8):
    adam = {0: Adam(), 1: Adam()}
    for pair in grads:
        for i, (x, g, rate) in enumerate(((a, pair[0], lr), (b, pair[1], lr * ratio))):
            m, v = adam[i](g)
            x *= 1 - rate * decay
            x -= rate * m / (np.sqrt(v) + eps)
        yield a.copy(), b.copy()


def spec_riemannian(a, b, grads, ordering, lr=1e-2, reg=1e-3, decay=0.1, eps=1e-6):
    adam, eye = {0: Adam(), 1: Adam()}, np.eye(a.shape[1])
    for t, (grad_a, grad_b) in enumerate(grads, start=1):
        a_before = a.copy()
        for i, x in enumerate((a, b)):
            if i == 0:
                g = grad_a @ np.linalg.inv(b @ b.T + reg * eye)
            else:
                seen = a if ordering == "sequential" else a_before
                g = np.linalg.inv(seen.T @ seen + reg * eye) @ grad_b
            m, v = adam[i](g)
            if ordering == "sequential":
                x -= lr * m / (np.sqrt(v) + eps / np.sqrt(1 - 0.999**t))
                x *= 1 - lr * decay
            else:
                x *= 1 - lr * decay
                x -= lr * m / (np.sqrt(v) + eps)
        yield a.copy(), b.copy()


def spec_lora_rite(a, b, grads, lr=1e-2, decay=0.1, clip=1.0, skip=5.0, cap=0.5, eps=1e-6):
    x, state, old = [a.copy(), b.T.copy()], [None, None], [None, None]
    for t, pair in enumerate(grads, start=1):
        g, (d1, d2) = (pair[0], pair[1].T), (β * (1 - β ** (t - 1)) / (1 - β**t) for β in (0.9, 0.999))
        bases, roots = zip(*(np.linalg.qr(each) for each in x), strict=True)
        inverses = [np.linalg.pinv(each, rcond=each.shape[0] * 2.2e-16) for each in roots]
        u = [g[i] @ inverses[1 - i] for i in (0, 1)]
        u = [each * (np.sqrt(np.mean(each**2)) <= skip) for each in u]
        norm = np.sqrt(sum(np.sum(each**2) for each in u))
        for i in (0, 1):
            transport = bases[1 - i].T @ old[1 - i] if t > 1 else np.zeros((u[i].shape[1],) * 2)
            v, m = state[i] if t > 1 else (np.zeros_like(transport), np.zeros_like(u[i]))
            scaled = u[i] * min(1, clip / norm)
            v = (1 - d2) * scaled.T @ scaled / len(scaled) + d2 * transport @ v @ transport.T
            values, vectors = np.linalg.eigh(v)
            root = vectors / (np.sqrt(np.maximum(values, 0)) + eps) @ vectors.T
            m = (1 - d1) * scaled @ root + d1 * m @ transport.T
            state[i] = v, m
            capped = m / max(1, np.sqrt(np.mean(m**2)) / cap)
            x[i] = x[i] - lr * (capped @ inverses[1 - i].T + decay * x[i])
        old = bases
        yield x[0].copy(), x[1].T.copy()

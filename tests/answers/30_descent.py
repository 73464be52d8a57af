"""Answers to the exercise of 30_descent, for tests/test_exercises.py: right ones, and wrong ones that people give."""

# %% right
def adamw_step(w, gradient, mean, square, step, lr, beta1, beta2, eps, decay):
    mean = beta1 * mean + (1 - beta1) * gradient
    square = beta2 * square + (1 - beta2) * gradient**2
    update = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + eps)
    return w - lr * (update + decay * w), mean, square

# %% right: the decay first
def adamw_step(w, gradient, mean, square, step, lr, beta1, beta2, eps, decay):
    mean, square = mean.lerp(gradient, 1 - beta1), square.lerp(gradient * gradient, 1 - beta2)
    scale = (square / (1 - beta2**step)).sqrt() + eps
    return w * (1 - lr * decay) - lr / (1 - beta1**step) * mean / scale, mean, square

# %% wrong: what begins at zero stays near it
def adamw_step(w, gradient, mean, square, step, lr, beta1, beta2, eps, decay):
    mean, square = mean.lerp(gradient, 1 - beta1), square.lerp(gradient**2, 1 - beta2)
    return w - lr * (mean / (square.sqrt() + eps) + decay * w), mean, square

# %% wrong: the decay goes through the averages, as in Adam
def adamw_step(w, gradient, mean, square, step, lr, beta1, beta2, eps, decay):
    gradient = gradient + decay * w
    mean, square = mean.lerp(gradient, 1 - beta1), square.lerp(gradient**2, 1 - beta2)
    return w - lr * mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + eps), mean, square

# %% wrong: eps under the root
def adamw_step(w, gradient, mean, square, step, lr, beta1, beta2, eps, decay):
    mean, square = mean.lerp(gradient, 1 - beta1), square.lerp(gradient**2, 1 - beta2)
    update = mean / (1 - beta1**step) / (square / (1 - beta2**step) + eps).sqrt()
    return w - lr * (update + decay * w), mean, square

# %% wrong: a decay that does not go down with the rate
def adamw_step(w, gradient, mean, square, step, lr, beta1, beta2, eps, decay):
    mean, square = mean.lerp(gradient, 1 - beta1), square.lerp(gradient**2, 1 - beta2)
    return w * (1 - decay) - lr * mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + eps), mean, square

# %% wrong: the averages come back as corrected, and are corrected again
def adamw_step(w, gradient, mean, square, step, lr, beta1, beta2, eps, decay):
    mean = mean.lerp(gradient, 1 - beta1) / (1 - beta1**step)
    square = square.lerp(gradient**2, 1 - beta2) / (1 - beta2**step)
    return w - lr * (mean / (square.sqrt() + eps) + decay * w), mean, square

# %% wrong: no root
def adamw_step(w, gradient, mean, square, step, lr, beta1, beta2, eps, decay):
    mean, square = mean.lerp(gradient, 1 - beta1), square.lerp(gradient**2, 1 - beta2)
    update = mean / (1 - beta1**step) / (square / (1 - beta2**step) + eps)
    return w - lr * (update + decay * w), mean, square

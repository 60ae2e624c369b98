"""One training step without the network: t, noise, loss, gradient."""


def test_training_step(measure, case, peer):
    measure(case, peer)

"""Each operation alone: noising, loss with and without gradient, sampler step."""


def test_operation(measure, case, peer):
    measure(case, peer)

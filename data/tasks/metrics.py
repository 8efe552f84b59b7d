"""What GLUE's tasks are scored by: functions of predictions and labels, fp64 tensors of one length.
"""


def accuracy(predicted, labels):
    return (predicted == labels).double().mean().item()


def f1(predicted, labels):
    """Harmonic mean of precision and recall of class 1."""
    hits = ((predicted == 1) & (labels == 1)).sum().item()
    return 2 * hits / max(1, ((predicted == 1).sum() + (labels == 1).sum()).item())


def pearson(predicted, labels):
    """Correlation; 0 where either does not vary."""
    a, b = predicted - predicted.mean(), labels - labels.mean()
    return ((a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt().clamp(min=1e-300)).item()


matthews = pearson  # of two classes, Matthews' correlation is Pearson's of zeros and ones


def spearman(predicted, labels):
    """Correlation of the ranks, equal values sharing the mean of theirs."""
    return pearson(ranks(predicted), ranks(labels))


def ranks(values):
    _, group, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[group]


METRICS = dict(accuracy=accuracy, f1=f1, pearson=pearson, spearman=spearman, matthews=matthews)

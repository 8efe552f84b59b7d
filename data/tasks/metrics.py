"""The metrics of GLUE. All take predictions and labels, fp64 tensors of the same length."""


def accuracy(predicted, labels):
    return (predicted == labels).double().mean().item()


def f1(predicted, labels):
    """Compute the harmonic mean of precision and recall of class 1."""
    hits = ((predicted == 1) & (labels == 1)).sum().item()
    return 2 * hits / max(1, ((predicted == 1).sum() + (labels == 1).sum()).item())


def pearson(predicted, labels):
    """Compute the correlation. It is 0 if either side is constant."""
    if 1 in (len(predicted.unique()), len(labels.unique())):  # its mean may be rounded
        return 0.0
    a, b = predicted - predicted.mean(), labels - labels.mean()
    return ((a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt().clamp(min=1e-300)).item()


def spearman(predicted, labels):
    return pearson(ranks(predicted), ranks(labels))


def ranks(values):
    """Rank the values from 1. Equal values share their mean rank."""
    _, group, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0).double() - (count - 1) / 2)[group]


# For two classes, Matthews' correlation equals Pearson's of zeros and ones.
METRICS = dict(accuracy=accuracy, f1=f1, pearson=pearson, spearman=spearman, matthews=pearson)

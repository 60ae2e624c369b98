"""What a figure shows, in words: a test compares them with what the plot is meant to be."""

LEFT_OUT = {"", "None", None}


def described(figure) -> list[str]:
    """A line for each thing of a matplotlib figure that is drawn, but for pixels and the data of lines and points: its
    words, sizes (inches; points), colours, scales and limits."""
    figure.canvas.draw()
    layout = type(figure.get_layout_engine()).__name__
    lines = [f"{_numbers(figure.get_size_inches())} inches, {_colour(figure.get_facecolor())}, {layout}"]
    lines += [_text("title", figure._suptitle)] if figure._suptitle else []
    for axes in figure.axes:
        lines += _axes(axes)
    for legend in figure.legends:
        lines += _legend(legend)
    return lines


def _axes(axes) -> list[str]:
    pad = axes.titleOffsetTrans.get_matrix()[1, 2] / axes.figure.dpi * 72
    lines = [_text("axes", axes.title) + f" {pad:g} above"]
    for name, axis, limits in (("x", axes.xaxis, axes.get_xlim()), ("y", axes.yaxis, axes.get_ylim())):
        grid = axis.get_gridlines()[0] if axis.get_gridlines() else None
        parts = [axis.get_scale(), f"from {_numbers(limits)}", _text("label", axis.label)]
        if grid is not None and grid.get_visible():
            parts.append(f"grid {_colour(grid.get_color())} {grid.get_linewidth():g} {grid.get_alpha():g}")
        if axes.axison:
            if axis.get_ticklabels():
                tick, where = axis.get_major_ticks()[0], axis.get_ticks_position()
                label = tick.label2 if where == "top" else tick.label1
                parts.append(f"ticks {where} {label.get_fontsize():g} {_colour(label.get_color())} long {tick._size:g}")
            lines.append(", ".join([f" {name}: {parts[0]}", *parts[1:]]))
    sides = [f"{side} {_colour(spine.get_edgecolor())}" for side, spine in axes.spines.items() if spine.get_visible()]
    if axes.axison and axes.get_frame_on():
        lines.append(f" frame: {', '.join(sides)} on {_colour(axes.get_facecolor())}")
    for line in axes.lines:
        marker = f" {line.get_marker()}{line.get_markersize():g}" if line.get_marker() not in LEFT_OUT else ""
        lines.append(
            f" line{_label(line)} {_colour(line.get_color())} {line.get_linewidth():g} "
            f"{line.get_linestyle()}{marker}{_alpha(line)}"
        )
    for points in axes.collections:
        sizes = _numbers(points.get_sizes()) if hasattr(points, "get_sizes") else ""
        lines.append(
            f" points {sizes} {_colour(points.get_facecolor()[0])} order {points.get_zorder():g} "
            f"edges {_numbers(points.get_linewidths())}{_alpha(points)}"
        )
    for patch in axes.patches:
        box = (patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height())
        lines.append(
            f" box {_numbers(box)} {_colour(patch.get_facecolor())} edge {patch.get_linewidth():g} "
            f"order {patch.get_zorder():g}{_alpha(patch)}"
        )
    for image in axes.images:
        lines.append(
            f" image {image.get_array().shape} from {_numbers(image.get_clim())} {image.cmap.name} "
            f"{image.get_interpolation()}"
        )
    for text in axes.texts:
        lines.append(_text(f" text at {_numbers(text.get_position())} {text.get_va()}", text))
    return lines + (_legend(axes.get_legend()) if axes.get_legend() else [])


def _legend(legend) -> list[str]:
    frame = legend.get_frame()
    framed = f"frame {_colour(frame.get_edgecolor())} {frame.get_alpha():g}" if legend.get_frame_on() else "no frame"
    lines = [f"legend in {legend._ncols} columns, {framed}, {legend.columnspacing:g} {legend.handletextpad:g}"]
    for handle, text in zip(legend.legend_handles, legend.get_texts()):
        marker = f"{handle.get_marker()}{handle.get_markersize():g}" if handle.get_marker() not in LEFT_OUT else ""
        lines.append(_text(f" {_colour(handle.get_color())} {handle.get_linestyle()} {marker}".rstrip(), text))
    return lines


def _text(name, text) -> str:
    bold = " bold" if text.get_fontweight() == "bold" else ""
    return f"{name} {text.get_text()!r} {text.get_fontsize():g}{bold} {_colour(text.get_color())}"


def _label(artist) -> str:
    return "" if artist.get_label().startswith("_") else f" {artist.get_label()!r}"


def _numbers(values) -> str:
    return " ".join(f"{float(value):.4g}" for value in values)


def _colour(colour) -> str:
    from matplotlib.colors import to_hex, to_rgba

    rgba = to_rgba(colour)
    return to_hex(rgba, keep_alpha=rgba[3] < 1)


def _alpha(artist) -> str:
    return "" if artist.get_alpha() is None else f" alpha {artist.get_alpha():g}"

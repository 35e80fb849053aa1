//! Plots as SVG. Colours come from the page's style sheet, by class.

use std::fmt::Write as _;

use crate::junit::escape;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 280.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 40.0;

/// A scale with its ticks.
pub(super) struct Axis {
    label: &'static str,
    from: f64,
    to: f64,
    log: bool,
    ticks: Vec<(f64, String)>,
}

impl Axis {
    /// Even steps at round numbers; `to` is always inside.
    pub(super) fn linear(label: &'static str, from: f64, to: f64) -> Axis {
        let rough = (to - from).max(1e-9) / 5.0;
        let magnitude = 10f64.powf(rough.log10().floor());
        let steps = [1.0, 2.0, 5.0, 10.0];
        let step = steps.iter().map(|step| step * magnitude).find(|step| *step >= rough).unwrap_or(rough);
        let mut ticks = Vec::new();
        let mut at = from;
        while at <= to + step * 0.001 {
            ticks.push((at, short(at)));
            at += step;
        }
        // Throughput and stock end a little above their highest point, time at its end.
        let to = if label == "seconds" { to } else { to * 1.05 };
        Axis { label, from, to, log: false, ticks }
    }

    /// Decades around everything the lines show.
    pub(super) fn log(label: &'static str, lines: &[Line]) -> Axis {
        let values = || lines.iter().flat_map(|line| &line.points).map(|(_, y)| *y).filter(|y| *y > 0.0);
        let least = values().fold(f64::INFINITY, f64::min);
        let most = values().fold(0.0, f64::max);
        let (least, most) = if most > 0.0 { (least, most) } else { (0.1, 10.0) };
        let (from, mut to) = (least.log10().floor(), most.log10().ceil());
        if from >= to {
            to = from + 1.0;
        }
        let mut ticks = Vec::new();
        for decade in from as i32..=to as i32 {
            let value = 10f64.powi(decade);
            ticks.push((value, short(value)));
        }
        Axis { label, from: 10f64.powf(from), to: 10f64.powf(to), log: true, ticks }
    }

    /// Percentiles by their nines.
    pub(super) fn nines(to: f64) -> Axis {
        let all = ["0", "90", "99", "99.9", "99.99", "99.999", "99.9999", "99.99999"];
        let mut ticks = vec![(0.301, "50".to_owned())];
        for (nines, name) in (0u32..).zip(all) {
            if f64::from(nines) <= to && nines > 0 {
                ticks.push((f64::from(nines), name.to_owned()));
            }
        }
        Axis { label: "percentile", from: 0.0, to, log: false, ticks }
    }

    /// Where a value lies, 0 to 1.
    fn place(&self, value: f64) -> f64 {
        if self.log {
            (value.max(self.from).log10() - self.from.log10()) / (self.to.log10() - self.from.log10())
        } else {
            (value - self.from) / (self.to - self.from).max(1e-12)
        }
    }
}

fn short(value: f64) -> String {
    let (value, unit) = match value.abs() {
        1e6.. => (value / 1e6, "M"),
        1e4.. => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let text = format!("{value:.3}");
    format!("{}{unit}", text.trim_end_matches('0').trim_end_matches('.'))
}

/// A line with its legend.
pub(super) struct Line {
    pub(super) name: &'static str,
    pub(super) class: &'static str,
    pub(super) points: Vec<(f64, f64)>,
}

/// A band of a stack: x, from, to.
pub(super) struct Area {
    pub(super) name: &'static str,
    pub(super) class: &'static str,
    pub(super) points: Vec<(f64, f64, f64)>,
}

/// A plot.
pub(super) struct Plot<'a> {
    pub(super) title: &'static str,
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) areas: Vec<Area>,
    pub(super) lines: Vec<Line>,
    /// Events, by their x.
    pub(super) marks: &'a [(f64, String)],
    /// The warm-up: shaded up to this x.
    pub(super) shade: f64,
}

impl Plot<'_> {
    fn at(&self, x: f64, y: f64) -> (f64, f64) {
        let across = LEFT + self.x.place(x).clamp(0.0, 1.0) * (WIDTH - LEFT - RIGHT);
        let up = HEIGHT - BOTTOM - self.y.place(y).clamp(0.0, 1.0) * (HEIGHT - TOP - BOTTOM);
        (across, up)
    }

    /// The plot with its title and legend.
    pub(super) fn svg(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail, here and below.
        let _ = write!(out, "<figure><figcaption>{}<span class=\"legend\">", self.title);
        let names = self.areas.iter().map(|area| (area.name, area.class));
        for (name, class) in names.chain(self.lines.iter().map(|line| (line.name, line.class))) {
            let _ = write!(out, "<i class=\"{class}\"></i>{name} ");
        }
        let _ = write!(
            out,
            "</span></figcaption>\n<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">\n",
            self.title
        );
        self.grid(&mut out);
        if self.shade > 0.0 {
            let (from, _) = self.at(0.0, 0.0);
            let (to, _) = self.at(self.shade, 0.0);
            let _ = writeln!(
                out,
                "<rect class=\"shade\" x=\"{from:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{:.1}\"><title>warm-up</title></rect>",
                (to - from).max(0.0),
                HEIGHT - TOP - BOTTOM
            );
        }
        for area in &self.areas {
            self.area(&mut out, area);
        }
        for line in &self.lines {
            self.line(&mut out, line);
        }
        self.marks(&mut out);
        out.push_str("</svg></figure>\n");
        out
    }

    fn grid(&self, out: &mut String) {
        for (value, text) in &self.y.ticks {
            let (_, y) = self.at(self.x.from, *value);
            let _ = writeln!(
                out,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/><text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>",
                WIDTH - RIGHT,
                LEFT - 8.0,
                y + 4.0
            );
        }
        for (value, text) in &self.x.ticks {
            let (x, _) = self.at(*value, self.y.from);
            let _ = writeln!(
                out,
                "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{:.1}\"/><text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text>",
                HEIGHT - BOTTOM,
                HEIGHT - BOTTOM + 18.0
            );
        }
        let _ = writeln!(
            out,
            "<text class=\"label\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text><text class=\"label\" x=\"{LEFT}\" y=\"{:.1}\">{}</text>",
            WIDTH - RIGHT,
            HEIGHT - 6.0,
            self.x.label,
            TOP - 12.0,
            self.y.label
        );
    }

    fn area(&self, out: &mut String, area: &Area) {
        let mut path = String::new();
        for (x, _, top) in &area.points {
            let (x, y) = self.at(*x, *top);
            let _ = write!(path, "{}{x:.1},{y:.1}", if path.is_empty() { "M" } else { "L" });
        }
        for (x, bottom, _) in area.points.iter().rev() {
            let (x, y) = self.at(*x, *bottom);
            let _ = write!(path, "L{x:.1},{y:.1}");
        }
        let _ = writeln!(
            out,
            "<path class=\"area {}\" d=\"{path}Z\"><title>{}</title></path>",
            area.class, area.name
        );
    }

    fn line(&self, out: &mut String, line: &Line) {
        let mut path = String::new();
        for (x, y) in &line.points {
            let (x, y) = self.at(*x, *y);
            let _ = write!(path, "{}{x:.1},{y:.1}", if path.is_empty() { "M" } else { "L" });
        }
        let _ = writeln!(
            out,
            "<path class=\"line {}\" d=\"{path}\"><title>{}</title></path>",
            line.class, line.name
        );
    }

    fn marks(&self, out: &mut String) {
        for (number, (at, name)) in self.marks.iter().enumerate() {
            let (x, _) = self.at(*at, self.y.from);
            // Names stand on the side that has room, and in turn on two heights where events are close.
            let (anchor, shift) = if self.x.place(*at) > 0.6 { ("end", -5.0) } else { ("start", 5.0) };
            let _ = writeln!(
                out,
                "<line class=\"mark\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{:.1}\"/><text class=\"mark\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{}</text>",
                HEIGHT - BOTTOM,
                x + shift,
                TOP + 12.0 + 14.0 * (number % 2) as f64,
                escape(name)
            );
        }
    }
}

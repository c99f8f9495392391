//! Plots as SVG, from numbers. No I/O.

use super::target::{Ratio, digits};
use std::fmt::Write as _;

/// One bar: how it is called, what it shows, and whether it is ours.
#[derive(Clone, Debug)]
pub(super) struct Bar {
    /// Its label.
    pub(super) label: String,
    /// The bar's length and its range.
    pub(super) value: Ratio,
    /// Whether it is drawn in the project's colour.
    pub(super) ours: bool,
}

/// One line of a plot over the number of Services.
#[derive(Clone, Debug)]
pub(super) struct Line {
    /// Its label.
    pub(super) label: String,
    /// Where it goes: x as a number, and what was measured there.
    pub(super) points: Vec<(f64, Ratio)>,
    /// Whether it is drawn in the project's colour.
    pub(super) ours: bool,
}

const WIDTH: f64 = 760.0;
const LABELS: f64 = 330.0;
const ROW: f64 = 24.0;
const TOP: f64 = 40.0;
const OURS: &str = "#2563a8";
const OTHERS: &str = "#9aa3ad";
/// As many as there are lines of one colour at most: the series of drift.
const STROKES: [&str; 6] = ["", "6 3", "2 3", "8 3 2 3", "12 3", "1 6"];

fn head(height: f64, title: &str) -> String {
    let title = escaped(title);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"8\" y=\"20\" font-size=\"14\" font-weight=\"bold\">{title}</text>\n"
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn colour(ours: bool) -> &'static str {
    if ours { OURS } else { OTHERS }
}

/// Bars from zero with whiskers from the smallest to the largest; a line at `mark`.
pub(super) fn bars(title: &str, rows: &[Bar], mark: Option<f64>) -> String {
    let height = TOP + ROW * rows.len() as f64 + 16.0;
    let most = rows.iter().map(|row| row.value.max).chain(mark).fold(f64::MIN_POSITIVE, f64::max) * 1.15;
    let x = |value: f64| LABELS + (WIDTH - LABELS - 70.0) * (value / most).clamp(0.0, 1.0);
    let mut svg = head(height, title);
    for (index, row) in rows.iter().enumerate() {
        let Ratio { median, min, max } = row.value;
        let y = TOP + ROW * index as f64;
        let middle = y + ROW / 2.0;
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n\
             <rect x=\"{LABELS}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\"/>\n\
             <path d=\"M{:.1} {middle:.1}H{:.1}\" stroke=\"black\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\">{}</text>\n",
            LABELS - 8.0,
            middle + 4.0,
            escaped(&row.label),
            y + 4.0,
            x(median) - LABELS,
            ROW - 8.0,
            colour(row.ours),
            x(min),
            x(max),
            x(max) + 6.0,
            middle + 4.0,
            digits(median),
        );
    }
    if let Some(mark) = mark {
        let x = x(mark);
        let _ = writeln!(
            svg,
            "<path d=\"M{x:.1} {:.1}V{:.1}\" stroke=\"#c0392b\" stroke-dasharray=\"4 3\"/>",
            TOP - 8.0,
            height - 8.0
        );
    }
    svg + "</svg>\n"
}

/// How numbers lie on an x axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Axis {
    /// By their logarithms; each that occurs is written below.
    Logarithmic,
    /// As they are, with five marks.
    Even,
}

impl Axis {
    fn place(self, value: f64) -> f64 {
        match self {
            Self::Logarithmic => value.log10(),
            Self::Even => value,
        }
    }

    /// What is written below it.
    fn marks(self, mut values: Vec<f64>) -> Vec<f64> {
        match self {
            Self::Logarithmic => {
                values.sort_by(f64::total_cmp);
                values.dedup();
                values
            }
            Self::Even => {
                let most = values.into_iter().fold(0.0, f64::max);
                (1..=5).map(|part| (most * f64::from(part) / 5.0).floor()).collect()
            }
        }
    }
}

/// Lines over an x axis, with their ranges.
pub(super) fn lines(title: &str, axis: Axis, lines: &[Line]) -> String {
    const PLOT: f64 = 260.0;
    let (left, right) = (50.0, WIDTH - 230.0);
    let points = || lines.iter().flat_map(|line| &line.points);
    let least = points().map(|(x, _)| axis.place(*x)).fold(f64::INFINITY, f64::min);
    let most = points().map(|(x, _)| axis.place(*x)).fold(least + 1e-9, f64::max);
    let top = points().map(|(_, value)| value.max).fold(f64::MIN_POSITIVE, f64::max) * 1.05;
    let x = |value: f64| left + (right - left) * (axis.place(value) - least) / (most - least);
    let y = |value: f64| TOP + PLOT * (1.0 - (value / top).clamp(0.0, 1.0));
    let mut svg = head(TOP + PLOT + 40.0, title);
    for part in 0..=4 {
        let value = top * f64::from(part) / 4.0;
        let _ = write!(
            svg,
            "<path d=\"M{left} {0:.1}H{right}\" stroke=\"#e0e0e0\"/>\n<text x=\"{1}\" y=\"{2:.1}\" \
             text-anchor=\"end\">{value:.2}</text>\n",
            y(value),
            left - 6.0,
            y(value) + 4.0
        );
    }
    for size in axis.marks(points().map(|(x, _)| *x).collect()) {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{size}</text>",
            x(size),
            TOP + PLOT + 18.0
        );
    }
    for (index, line) in lines.iter().enumerate() {
        let path: Vec<_> =
            line.points.iter().map(|(at, value)| format!("{:.1} {:.1}", x(*at), y(value.median))).collect();
        let of_colour = lines[..index].iter().filter(|other| other.ours == line.ours).count();
        let (colour, dashes) = (colour(line.ours), STROKES[of_colour % STROKES.len()]);
        let style =
            format!("stroke=\"{colour}\" stroke-width=\"2\" stroke-dasharray=\"{dashes}\" fill=\"none\"");
        let _ = writeln!(svg, "<path d=\"M{}\" {style}/>", path.join("L"));
        for (at, value) in &line.points {
            let at = x(*at);
            let _ = writeln!(
                svg,
                "<path d=\"M{at:.1} {:.1}V{:.1}\" stroke=\"{colour}\"/>",
                y(value.min),
                y(value.max)
            );
        }
        let key = TOP + 18.0 * index as f64 + 10.0;
        let _ = write!(
            svg,
            "<path d=\"M{:.1} {key:.1}h30\" {style}/>\n<text x=\"{:.1}\" y=\"{:.1}\">{}</text>\n",
            right + 16.0,
            right + 52.0,
            key + 4.0,
            escaped(&line.label)
        );
    }
    svg + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_long_as_its_median_and_says_it() {
        let bar = |label: &str, median| Bar {
            label: label.into(),
            value: Ratio { median, min: median, max: median },
            ours: true,
        };
        let svg = bars("a < b", &[bar("one", 1.0), bar("two & more", 2.0)], Some(1.0));
        assert!(svg.contains("a &lt; b") && svg.contains("two &amp; more"), "{svg}");
        let widths: Vec<f64> = svg
            .lines()
            .filter(|line| line.contains("fill=\"#2563a8\""))
            .map(|line| line.split("width=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap())
            .collect();
        assert!((widths[1] / widths[0] - 2.0).abs() < 0.01, "{widths:?}");
    }

    #[test]
    fn lines_of_one_colour_differ_in_their_strokes() {
        let value = Ratio::exactly(1.0);
        let line = |ours| Line { label: "x".into(), points: vec![(10.0, value), (100.0, value)], ours };
        // As the legs of calls to a ClusterIP.
        let svg = lines("t", Axis::Logarithmic, &[false, true, false, false, true, false, false].map(line));
        let styles: std::collections::BTreeSet<_> = svg
            .lines()
            .filter(|line| line.contains("h30"))
            .filter_map(|line| line.split_once("stroke="))
            .map(|(_, style)| style)
            .collect();
        assert_eq!(styles.len(), 7, "{svg}");
    }

    #[test]
    fn lines_stay_in_their_frame() {
        let value = Ratio { median: 0.5, min: 0.4, max: 0.9 };
        let line = Line { label: "x".into(), points: vec![(10.0, value), (30_000.0, value)], ours: false };
        let svg = lines("t", Axis::Logarithmic, &[line]);
        assert!(svg.contains(">30000</text>") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        let over_time = Line { label: "x".into(), points: vec![(0.5, value), (100.0, value)], ours: true };
        let svg = lines("t", Axis::Even, &[over_time]);
        assert!(svg.contains(">20</text>") && svg.contains(">100</text>"), "{svg}");
        assert!(!lines("nothing", Axis::Logarithmic, &[]).contains("NaN"));
    }
}

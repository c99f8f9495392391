//! Rows as aligned columns, as `kubectl` prints them.

/// Something that is shown as a line of a table.
pub(super) trait Row {
    /// The headings.
    const HEADINGS: &'static [&'static str];

    /// One cell for each heading.
    fn cells(&self) -> Vec<String>;
}

/// The headings and the rows, each column as wide as its widest cell, three spaces apart.
pub(super) fn table<R: Row>(rows: &[R]) -> String {
    let headings = R::HEADINGS.iter().map(|heading| (*heading).to_owned()).collect();
    let lines: Vec<Vec<String>> = std::iter::once(headings).chain(rows.iter().map(Row::cells)).collect();
    let mut widths = vec![0; R::HEADINGS.len()];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for line in &lines {
        let cells = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}   "));
        text.push_str(cells.collect::<String>().trim_end());
        text.push('\n');
    }
    text
}

/// A number of seconds in the largest units that matter: `45s`, `3m20s`, `23h59m`.
pub(super) fn short_time(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m{}s", seconds / 60, seconds % 60),
        _ => format!("{}h{}m", seconds / 3_600, seconds % 3_600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Pair(&'static str, &'static str);

    impl Row for Pair {
        const HEADINGS: &'static [&'static str] = &["ONE", "TWO"];

        fn cells(&self) -> Vec<String> {
            vec![self.0.into(), self.1.into()]
        }
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        assert_eq!(table(&[Pair("a", "b"), Pair("long", "")]), "ONE    TWO\na      b\nlong\n");
    }

    #[test]
    fn times_are_short() {
        assert_eq!([59, 60, 3_599, 86_399].map(short_time), ["59s", "1m0s", "59m59s", "23h59m"]);
    }
}

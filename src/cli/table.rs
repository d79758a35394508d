//! Tables for people: columns lined up, numbers to the right, no trailing blanks.

/// A table under construction.
#[derive(Debug)]
pub(super) struct Table {
    heads: Vec<Head>,
    rows: Vec<Vec<String>>,
}

/// The top of a column.
#[derive(Debug, Clone, Copy)]
pub(super) enum Head {
    /// Text, lined up to the left.
    Left(&'static str),
    /// Amounts, lined up to the right.
    Right(&'static str),
}

impl Head {
    fn text(self) -> &'static str {
        match self {
            Self::Left(text) | Self::Right(text) => text,
        }
    }
}

impl Table {
    /// Begins a table.
    pub(super) fn new(heads: &[Head]) -> Self {
        Self { heads: heads.to_vec(), rows: Vec::new() }
    }

    /// Adds a row, one cell for each column.
    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        assert_eq!(N, self.heads.len(), "a row has a cell for each column");
        self.rows.push(cells.into());
    }

    /// Returns the table with its heads.
    pub(super) fn render(&self) -> String {
        let heads: Vec<String> = self.heads.iter().map(|head| head.text().to_owned()).collect();
        let all = || std::iter::once(&heads).chain(&self.rows);
        let widths: Vec<usize> =
            (0..heads.len()).map(|i| all().map(|row| row[i].chars().count()).max().unwrap_or(0)).collect();
        let mut text = String::new();
        for row in all() {
            let mut line = String::new();
            for ((cell, head), &width) in row.iter().zip(&self.heads).zip(&widths) {
                match head {
                    Head::Left(_) => line.push_str(&format!("{cell:<width$}  ")),
                    Head::Right(_) => line.push_str(&format!("{cell:>width$}  ")),
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Returns lines of `name: value`, the values lined up.
pub(super) fn sheet(lines: &[(&str, String)]) -> String {
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 1;
    lines.iter().map(|(name, value)| format!("{:<width$} {value}\n", format!("{name}:"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&[Head::Left("NAME"), Head::Right("SIZE"), Head::Left("NOTE")]);
        table.row(["a".into(), "10.0 GiB".into(), "x".into()]);
        table.row(["l\u{e4}nger".into(), "0".into(), String::new()]);
        assert_eq!(table.render(), "NAME        SIZE  NOTE\na       10.0 GiB  x\nl\u{e4}nger         0\n");
    }

    #[test]
    fn sheets_line_up() {
        assert_eq!(sheet(&[("name", "web".into()), ("size", "1".into())]), "name: web\nsize: 1\n");
        assert_eq!(sheet(&[("a", "1".into()), ("long", "2".into())]), "a:    1\nlong: 2\n");
    }
}

// SPDX-License-Identifier: GPL-2.0-or-later
//! Joins the metrics of several servers into one OpenMetrics text.
//!
//! In such a text each metric family is in one place, so the texts cannot just be put one behind
//! the other. The samples of each server have a label with its socket already.

#![forbid(unsafe_code)]

/// A metric family: the lines that describe it, and those of its samples.
struct Family<'a> {
    name: &'a str,
    about: Vec<&'a str>,
    samples: Vec<&'a str>,
}

/// Joins the texts of the servers with these control sockets. None stands for a server that did not answer.
pub(crate) fn merge(texts: &[(String, Option<String>)]) -> String {
    let mut families: Vec<Family<'_>> = Vec::new();
    for text in texts.iter().filter_map(|(_, text)| text.as_deref()) {
        add(text, &mut families);
    }
    let mut out =
        String::from("# TYPE ivshmem_up gauge\n# HELP ivshmem_up Whether the server answered.\n");
    for (control, text) in texts {
        let control = control.replace('\\', r"\\").replace('"', "\\\"").replace('\n', "\\n");
        let up = u8::from(text.is_some());
        out.push_str(&format!("ivshmem_up{{control=\"{control}\"}} {up}\n"));
    }
    for line in families.iter().flat_map(|family| family.about.iter().chain(&family.samples)) {
        out.push_str(line);
        out.push('\n');
    }
    out + "# EOF\n"
}

fn add<'a>(text: &'a str, families: &mut Vec<Family<'a>>) {
    let mut current = None;
    for line in text.lines().filter(|line| *line != "# EOF") {
        let Some(about) = line.strip_prefix("# ") else {
            if let Some(index) = current {
                let family: &mut Family<'a> = &mut families[index];
                family.samples.push(line);
            }
            continue;
        };
        let name = about.split(' ').nth(1).unwrap_or_default();
        let index = families.iter().position(|family| family.name == name).unwrap_or_else(|| {
            families.push(Family { name, about: Vec::new(), samples: Vec::new() });
            families.len() - 1
        });
        current = Some(index);
        if !families[index].about.contains(&line) {
            families[index].about.push(line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_family_is_in_one_place() {
        let text = |socket: &str| {
            format!(
                "# TYPE a gauge\n# HELP a A.\na{{s=\"{socket}\"}} 1\n# TYPE b counter\n\
                 b_total{{s=\"{socket}\"}} 2\n# EOF\n"
            )
        };
        let texts = [
            ("/x".to_owned(), Some(text("x"))),
            ("/y".to_owned(), None),
            ("/z\"".to_owned(), Some(text("z"))),
        ];
        assert_eq!(
            merge(&texts),
            "# TYPE ivshmem_up gauge\n# HELP ivshmem_up Whether the server answered.\n\
             ivshmem_up{control=\"/x\"} 1\nivshmem_up{control=\"/y\"} 0\n\
             ivshmem_up{control=\"/z\\\"\"} 1\n\
             # TYPE a gauge\n# HELP a A.\na{s=\"x\"} 1\na{s=\"z\"} 1\n\
             # TYPE b counter\nb_total{s=\"x\"} 2\nb_total{s=\"z\"} 2\n# EOF\n"
        );
    }
}

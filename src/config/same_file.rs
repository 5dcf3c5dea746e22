//! Whether two paths are of one file, before anything is opened: by how they are written ([`lexical`]) or by what exists
//! too ([`resolved`]). Hard links, bind mounts and numbers of devices are told apart when the devices are opened.

use std::path::{Component, Path, PathBuf};

/// Without `.` and `..`. Of a path with links that is not the file it names: only to compare.
pub fn lexical(path: &Path) -> PathBuf {
    walk(path, |_| None)
}

/// As [`lexical`], with links followed as far as the path exists. Looks at the file system.
pub fn resolved(path: &Path) -> PathBuf {
    // Mostly all of it exists, or all but the last part.
    path.canonicalize().unwrap_or_else(|_| walk(path, |part| part.canonicalize().ok()))
}

fn walk(path: &Path, follow: impl Fn(&Path) -> Option<PathBuf>) -> PathBuf {
    let mut walked = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            // That of the root is the root.
            Component::ParentDir => {
                walked.pop();
            }
            part => {
                walked.push(part);
                walked = follow(&walked).unwrap_or(walked);
            }
        }
    }
    walked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_how_they_are_written() {
        for (path, plain) in [("/a/./b", "/a/b"), ("/a/../b", "/b"), ("/../a", "/a"), ("/a//b/", "/a/b"), ("/", "/")] {
            assert_eq!(lexical(Path::new(path)), Path::new(plain));
        }
    }

    #[test]
    fn by_what_exists() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().canonicalize().unwrap();
        std::fs::create_dir_all(dir.join("deep/real")).unwrap();
        std::os::unix::fs::symlink("deep/real", dir.join("link")).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.join("dangling")).unwrap();
        for (path, is) in [
            ("link", "deep/real"),
            ("link/new", "deep/real/new"),
            ("link/../new", "deep/new"),
            ("missing/../link/./new", "deep/real/new"),
            ("dangling/x", "dangling/x"),
        ] {
            assert_eq!(resolved(&dir.join(path)), dir.join(is), "{path}");
        }
    }
}

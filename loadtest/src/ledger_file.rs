//! The record of every purchase, on disk: written by the workers while the load runs, read by the books in
//! pieces afterwards. However long a run is, only what is under way is in memory.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use crate::record::Purchase;

/// What every file begins with: a name, a version, the size of a record.
const MAGIC: &[u8; 32] = b"seckill-loadtest ledger 1 (32 B)";
const BUFFER_BYTES: usize = 256 * 1024;

/// One worker's file, being written.
pub struct LedgerWriter {
    file: BufWriter<File>,
}

impl LedgerWriter {
    /// Creates the file of a worker in a folder; one of an earlier run is written over.
    pub fn create(folder: &Path, worker: u32) -> io::Result<(LedgerWriter, PathBuf)> {
        let path = folder.join(format!("ledger-{worker:03}.bin"));
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(&path)?;
        let mut file = BufWriter::with_capacity(BUFFER_BYTES, file);
        file.write_all(MAGIC)?;
        Ok((LedgerWriter { file }, path))
    }

    /// Writes a purchase that has come to its end.
    pub fn write(&mut self, purchase: &Purchase) -> io::Result<()> {
        self.file.write_all(&purchase.to_bytes())
    }

    /// Writes what is buffered.
    pub fn finish(mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Where a purchase stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At {
    file: u32,
    record: u64,
}

/// The files of all workers, to be read and corrected.
pub struct Ledger {
    files: Vec<File>,
}

impl Ledger {
    /// Opens the files.
    pub fn open(paths: &[PathBuf]) -> io::Result<Ledger> {
        let mut files = Vec::with_capacity(paths.len());
        for path in paths {
            let mut file = OpenOptions::new().read(true).write(true).open(path)?;
            let mut magic = [0; MAGIC.len()];
            file.read_exact(&mut magic)?;
            if &magic != MAGIC {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("{} is no ledger of this version", path.display()),
                ));
            }
            files.push(file);
        }
        Ok(Ledger { files })
    }

    /// Shows every purchase, a buffer at a time.
    pub fn for_each(&self, mut see: impl FnMut(At, Purchase)) -> io::Result<()> {
        for (number, mut file) in (0u32..).zip(&self.files) {
            file.seek(SeekFrom::Start(MAGIC.len() as u64))?;
            let mut reader = io::BufReader::with_capacity(BUFFER_BYTES, file);
            let mut bytes = [0; Purchase::BYTES];
            for record in 0.. {
                match reader.read_exact(&mut bytes) {
                    Ok(()) => see(At { file: number, record }, Purchase::from_bytes(&bytes)),
                    Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => break,
                    Err(err) => return Err(err),
                }
            }
        }
        Ok(())
    }

    /// Shows those that `wanted` picks, at most `chunk` at a time, until none is left. What `see` does may take
    /// its time and correct them.
    pub fn chunks(
        &self,
        chunk: usize,
        wanted: impl Fn(&Purchase) -> bool,
        cursor: &mut Cursor,
    ) -> io::Result<Vec<(At, Purchase)>> {
        let mut found = Vec::new();
        let mut bytes = vec![0; BUFFER_BYTES];
        while let Some(file) = self.files.get(cursor.file) {
            let offset = MAGIC.len() as u64 + cursor.record * Purchase::BYTES as u64;
            let mut filled = 0;
            while filled < bytes.len() {
                match file.read_at(&mut bytes[filled..], offset + filled as u64)? {
                    0 => break,
                    read => filled += read,
                }
            }
            let (records, _) = bytes[..filled].as_chunks::<{ Purchase::BYTES }>();
            if records.is_empty() {
                *cursor = Cursor { file: cursor.file + 1, record: 0 };
                continue;
            }
            for record in records {
                let at = At { file: cursor.file as u32, record: cursor.record };
                cursor.record += 1;
                let purchase = Purchase::from_bytes(record);
                if wanted(&purchase) {
                    found.push((at, purchase));
                    if found.len() == chunk {
                        return Ok(found);
                    }
                }
            }
        }
        Ok(found)
    }

    /// Corrects a purchase.
    pub fn correct(&self, at: At, purchase: &Purchase) -> io::Result<()> {
        let offset = MAGIC.len() as u64 + at.record * Purchase::BYTES as u64;
        self.files[at.file as usize].write_all_at(&purchase.to_bytes(), offset)
    }
}

/// How far [`Ledger::chunks`] has come.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cursor {
    file: usize,
    record: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_in_chunks_and_can_be_corrected() {
        let folder = tempfile::tempdir().unwrap();
        let mut paths = Vec::new();
        for worker in 0..3 {
            let (mut writer, path) = LedgerWriter::create(folder.path(), worker).unwrap();
            for user in 0..10_000 {
                writer.write(&Purchase::new(user, worker, 0, 0)).unwrap();
            }
            writer.finish().unwrap();
            paths.push(path);
        }
        let ledger = Ledger::open(&paths).unwrap();
        let mut cursor = Cursor::default();
        let (mut seen, mut chunks) = (0, 0);
        loop {
            let chunk = ledger.chunks(1000, |purchase| purchase.user % 2 == 0, &mut cursor).unwrap();
            if chunk.is_empty() {
                break;
            }
            chunks += 1;
            seen += chunk.len();
            let (at, mut purchase) = chunk[0];
            purchase.resolve();
            purchase.coupon = 77;
            ledger.correct(at, &purchase).unwrap();
        }
        assert_eq!((seen, chunks), (15_000, 15));
        let (mut all, mut corrected) = (0, 0);
        ledger
            .for_each(|_, purchase| {
                all += 1;
                corrected += u32::from(purchase.coupon == 77);
            })
            .unwrap();
        assert_eq!((all, corrected), (30_000, 15));
    }
}

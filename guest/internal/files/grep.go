package files

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"

	"fused/internal/fault"
)

const (
	maxPattern = 4 << 10
	maxMatches = 10000
	usualMost  = 1000
	// maxLine is how much of a line is searched; maxShown how much of a match is told.
	maxLine  = 1 << 20
	maxShown = 4 << 10
	// sniffed is how much of a file is looked at for a NUL: such files are not text.
	sniffed = 8 << 10
)

// Query is what is searched for. Regular expressions are those of Go (RE2):
// their time grows with the text, not with the pattern's traps.
type Query struct {
	Pattern         string `json:"pattern"`
	Regex           bool   `json:"regex"`
	CaseInsensitive bool   `json:"case_insensitive"`
	MaxMatches      int    `json:"max_matches"`
}

// Match is the first match of one line.
type Match struct {
	Path  string `json:"path"`
	Line  int64  `json:"line"` // from 1
	Match string `json:"match"`
}

// Found is the answer to a search.
type Found struct {
	Matches   []Match `json:"matches"`
	Truncated bool    `json:"truncated"` // there may be more
}

type searcher struct {
	ctx    context.Context
	wanted *regexp.Regexp
	most   int
	found  Found
	reader *bufio.Reader
}

var errEnough = errors.New("enough matches")

// Grep searches a file, or all files below a folder in the order of their names.
// Links below it are not followed, binary files are left out, and so is what
// vanishes or cannot be read meanwhile.
func Grep(ctx context.Context, path string, query Query) (Found, error) {
	wanted, err := query.compile()
	if err != nil {
		return Found{}, err
	}
	s := &searcher{ctx: ctx, wanted: wanted, most: query.MaxMatches, reader: bufio.NewReaderSize(nil, 64<<10)}
	s.found.Matches = []Match{}
	if s.most == 0 {
		s.most = usualMost
	}
	info, err := os.Stat(path)
	if err != nil {
		return Found{}, err
	}
	if info.IsDir() {
		err = filepath.WalkDir(path, func(name string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.Type().IsRegular() {
				return ctx.Err()
			}
			return s.file(name)
		})
	} else {
		err = s.file(path)
	}
	if errors.Is(err, errEnough) {
		err = nil
	}
	return s.found, err
}

func (q Query) compile() (*regexp.Regexp, error) {
	if q.Pattern == "" || len(q.Pattern) > maxPattern {
		return nil, fault.BadRequest("pattern", "pattern must have 1 to "+strconv.Itoa(maxPattern)+" bytes")
	}
	if q.MaxMatches < 0 || q.MaxMatches > maxMatches {
		return nil, fault.BadRequest("max_matches", "max_matches must be 0 to "+strconv.Itoa(maxMatches))
	}
	text := q.Pattern
	if !q.Regex {
		text = regexp.QuoteMeta(text)
	}
	if q.CaseInsensitive {
		text = "(?i)" + text
	}
	wanted, err := regexp.Compile(text)
	if err != nil {
		return nil, fault.BadRequest("pattern", "the pattern is no regular expression (RE2): "+err.Error())
	}
	return wanted, nil
}

func (s *searcher) file(path string) error {
	content, err := Open(path)
	if err != nil {
		return s.ctx.Err() // removed, or nobody's to read
	}
	defer content.Close()
	s.reader.Reset(content)
	if head, _ := s.reader.Peek(sniffed); bytes.IndexByte(head, 0) >= 0 {
		return s.ctx.Err()
	}
	for number := int64(1); ; number++ {
		line, err := s.line()
		if at := s.wanted.FindIndex(line); at != nil && (len(line) > 0 || err == nil) {
			if len(s.found.Matches) == s.most {
				s.found.Truncated = true
				return errEnough
			}
			shown := line[at[0]:min(at[1], at[0]+maxShown)]
			s.found.Matches = append(s.found.Matches, Match{path, number, string(shown)})
		}
		if err != nil {
			return s.ctx.Err()
		}
	}
}

// line returns the next line without its end; of a long one, the beginning. The
// error is that of the end of the file.
func (s *searcher) line() ([]byte, error) {
	var line []byte
	for {
		part, err := s.reader.ReadSlice('\n')
		if room := maxLine - len(line); room > 0 {
			line = append(line, part[:min(room, len(part))]...)
		}
		switch {
		case err == nil:
			return bytes.TrimSuffix(bytes.TrimSuffix(line, []byte("\n")), []byte("\r")), s.ctx.Err()
		case errors.Is(err, bufio.ErrBufferFull):
			if s.ctx.Err() != nil {
				return nil, s.ctx.Err()
			}
		default:
			if !errors.Is(err, io.EOF) {
				line = nil
			}
			return line, err
		}
	}
}

package chunkfmt

import "fmt"

// HeaderSize is where the first page of a block is, in bytes.
const HeaderSize = headerSize

// PageHead is how many bytes of a page PageSize needs at most.
const PageHead = pageHead

// PageInfo is what a page says of itself.
type PageInfo struct {
	Kind     string
	Size     int64 // bytes of the whole page
	Unpacked int64 // bytes of its body
}

// pageNames are those of page types.
func (t pageType) String() string {
	names := [...]string{"", "data", "exemplar", "series", "label", "label values", "directory", "footer", "window", "directory", "directory"}
	if int(t) < len(names) && t > 0 {
		return names[t]
	}
	return fmt.Sprintf("type %d", byte(t))
}

// CheckHeader checks the first HeaderSize bytes of a block.
func CheckHeader(b []byte) error {
	if string(b) != magic {
		return corrupt("no block: its first bytes are %q", b)
	}
	return nil
}

// PageSize says how many bytes a page takes that starts with b, of which PageHead
// bytes are enough.
func PageSize(b []byte) (int64, error) {
	c := over(b)
	c.Byte()
	n := c.Bounded("page length", MaxPage)
	if c.Err != nil {
		return 0, c.Err
	}
	return int64(len(b)-len(c.B)) + int64(n) + pageTail, nil
}

// CheckPage checks a page of whatever type: its length, its checksum, and that it
// unpacks. What is in it is left to the parsers of its type.
func CheckPage(b []byte) (PageInfo, error) {
	if len(b) == 0 {
		return PageInfo{}, corrupt("ends early")
	}
	typ := pageType(b[0]) &^ pageZstd
	info := PageInfo{Kind: typ.String(), Size: int64(len(b))}
	if typ < pageData || typ > pageGroupsDirectory {
		return info, corrupt("a page of %s", typ)
	}
	body, err := onlyPage(b, typ)
	info.Unpacked = int64(len(body))
	return info, err
}

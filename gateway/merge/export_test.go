package merge

// ReadingAtOnce is readingAtOnce.
const ReadingAtOnce = readingAtOnce

-- The ledger: who was in a group, which key was granted to it, which topic a key protected, from when to when.
CREATE TABLE "span" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL,
  "of" TEXT,
  "by" TEXT,
  "open" TEXT,
  "lot" TEXT
) STRICT;
CREATE INDEX "span_of" ON "span" ("of", "id");
CREATE INDEX "span_by" ON "span" ("by", "id");
CREATE UNIQUE INDEX "span_open" ON "span" ("open");
CREATE INDEX "span_lot" ON "span" ("lot", "id");

-- Single-use enrolment tokens: what checks a proof, never the token.
CREATE TABLE "enrolmentToken" (
  "id" TEXT PRIMARY KEY NOT NULL,
  "version" INTEGER NOT NULL,
  "row" BLOB NOT NULL,
  "batch" TEXT
) STRICT;
CREATE INDEX "enrolmentToken_batch" ON "enrolmentToken" ("batch", "id");

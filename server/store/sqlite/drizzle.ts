import { createRequire } from 'node:module'
import type * as DrizzleOrm from 'drizzle-orm'
import type * as DrizzleOnBetterSqlite from 'drizzle-orm/better-sqlite3'
import type * as DrizzleSqlite from 'drizzle-orm/sqlite-core'

/**
 * drizzle-orm by its CommonJS build. Node parses a package's manifest (180 kB here) again for every ES module in it: that took each start of the server
 * 0.6 s of CPU, and takes 0.1 s so.
 */
const load = createRequire(import.meta.url)

export const { and, asc, count, eq, gt, gte, is, lte, Param, Placeholder, sql } = load('drizzle-orm') as typeof DrizzleOrm
export const { drizzle } = load('drizzle-orm/better-sqlite3') as typeof DrizzleOnBetterSqlite
export const { blob, getTableConfig, index, integer, primaryKey, sqliteTable, text, uniqueIndex } = load('drizzle-orm/sqlite-core') as typeof DrizzleSqlite

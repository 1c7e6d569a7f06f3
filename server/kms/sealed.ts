import { Problem } from '@fleetkey/protocol/problem.ts'

const reason = 'kms.sealed'

/** Something that opens the keys is not there (a passphrase, a file, a token): the process waits for it, or for shares, and does nothing else. */
export const sealed = (why: string): Problem => new Problem('unavailable', why, { reason })

export const isSealed = (problem: Problem): boolean => problem.reason === reason

import type { KMSClient } from '@aws-sdk/client-kms'
import { Problem } from '@fleetkey/protocol/problem.ts'

/** How AWS KMS is reached. */
export interface AwsPlace {
  readonly region: string
  /** Another address than AWS's own for the region; null: that one. */
  readonly endpoint: string | null
}

/** Requests under way at a time: AWS answers each in some milliseconds, and refuses bursts. */
const requestsAtOnce = 32
const attempts = 4
const patience = { connection: 5_000, request: 15_000 } as const

/** Errors of credentials and their rights: AWS's own names, and that of the SDK when it finds none at all. */
const credentialErrors = new Set([
  'AccessDeniedException',
  'CredentialsProviderError',
  'ExpiredTokenException',
  'IncompleteSignature',
  'InvalidClientTokenId',
  'InvalidSignatureException',
  'MissingAuthenticationTokenException',
  'NotAuthorized',
  'OptInRequired',
  'UnrecognizedClientException',
])
/** Errors of one key: it is gone, disabled, or waits for its deletion. */
const keyErrors = new Set(['DisabledException', 'KMSInvalidStateException', 'KeyUnavailableException', 'NotFoundException'])

const nameOf = (thrown: unknown): string => (thrown instanceof Error ? thrown.name : '')

/** Whether AWS says that this ciphertext is not of this key and context, or was changed. */
export const isRefusedCiphertext = (thrown: unknown): boolean => ['InvalidCiphertextException', 'IncorrectKeyException'].includes(nameOf(thrown))

/** Whether there is no such key, or it ends already. */
export const isGone = (thrown: unknown): boolean => ['NotFoundException', 'KMSInvalidStateException'].includes(nameOf(thrown))

/** What went wrong, as this server says it. Nothing that AWS answers holds key material. */
const problemOf = (thrown: unknown, what: string): Problem => {
  if (thrown instanceof Problem) return thrown
  const name = nameOf(thrown)
  const words = `AWS KMS: ${what}: ${name}: ${(thrown instanceof Error ? thrown.message : String(thrown)).slice(0, 300)}`
  if (credentialErrors.has(name)) return new Problem('unavailable', words, { reason: 'kms.aws-credentials', retryAfterSeconds: 30, cause: thrown })
  if (keyErrors.has(name)) return new Problem('unavailable', words, { reason: 'kms.aws-key', retryAfterSeconds: 30, cause: thrown })
  return new Problem('unavailable', words, { reason: 'kms.aws', retryAfterSeconds: 5, cause: thrown })
}

/** AWS KMS in one region, with everything that can go wrong on the way turned into a Problem. */
export interface Service {
  /** Throws Problem('unavailable'): reason `kms.aws` (not reached, throttled), `kms.aws-credentials`, `kms.aws-key`; what `tell` gives for an error goes first. */
  ask<R>(what: string, request: (client: KMSClient) => Promise<R>, tell?: (thrown: unknown) => R | undefined): Promise<R>
  /** The same for what must not be done twice: it is not asked again when no answer comes. */
  askOnce<R>(what: string, request: (client: KMSClient) => Promise<R>): Promise<R>
  close(): void
}

/**
 * Opens the way to AWS KMS. Credentials come as the SDK finds them (environment, shared files, container, instance). `notice`: told what keeps the keys from being
 * used, and null once they can be used again.
 */
export const openService = async ({ region, endpoint }: AwsPlace, notice: (problem: Problem | null) => void): Promise<Service> => {
  // The SDK is large, and whoever has keys elsewhere never loads it.
  const { KMSClient } = await import('@aws-sdk/client-kms')
  const clientOf = (maxAttempts: number): KMSClient =>
    new KMSClient({
      region,
      ...(endpoint === null ? {} : { endpoint }),
      maxAttempts,
      requestHandler: { connectionTimeout: patience.connection, requestTimeout: patience.request, httpsAgent: { maxSockets: requestsAtOnce } },
    })
  const [client, insistsOnNothing] = [clientOf(attempts), clientOf(1)]
  let isLost = false
  let free = requestsAtOnce
  const waiting: (() => void)[] = []
  const place = async (): Promise<void> => {
    if (free > 0) free--
    else await new Promise<void>((resolve) => void waiting.push(resolve))
  }
  const leave = (): void => {
    const next = waiting.shift()
    if (next === undefined) free++
    else next()
  }
  const works = (): void => {
    if (isLost) notice(null)
    isLost = false
  }
  const asked = async <R>(what: string, request: () => Promise<R>, tell?: (thrown: unknown) => R | undefined): Promise<R> => {
    await place()
    try {
      const answer = await request()
      works()
      return answer
    } catch (thrown) {
      const told = tell?.(thrown)
      if (told !== undefined) {
        works()
        return told
      }
      const problem = problemOf(thrown, what)
      if (!isLost) notice(problem)
      isLost = true
      throw problem
    } finally {
      leave()
    }
  }
  return {
    ask: async (what, request, tell) => await asked(what, async () => await request(client), tell),
    askOnce: async (what, request) => await asked(what, async () => await request(insistsOnNothing)),
    close() {
      client.destroy()
      insistsOnNothing.destroy()
    },
  }
}

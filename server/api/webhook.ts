import { createHmac } from 'node:crypto'
import { request } from 'node:https'
import type { Secret } from '@fleetkey/protocol/secret.ts'

/** Where alerts go. The URL is the configuration's and nobody else's; answers that lead elsewhere are failures, not followed. */
export interface Webhook {
  readonly url: URL
  readonly secret: Secret
  /** PEM: CAs that vouch for the receiver; those of the system when undefined. */
  readonly ca: string | undefined
}

const patience = 10_000

/** Headers of one message (Standard Webhooks 1.0): HMAC-SHA256 over `id.timestamp.body`. `at`: milliseconds since 1970. */
export const webhookHeaders = (secret: Secret, of: { readonly id: string; readonly at: number; readonly body: string }): Readonly<Record<string, string>> => {
  const timestamp = String(Math.floor(of.at / 1000))
  const signature = createHmac('sha256', secret.bytes()).update(`${of.id}.${timestamp}.${of.body}`).digest('base64')
  return { 'webhook-id': of.id, 'webhook-timestamp': timestamp, 'webhook-signature': `v1,${signature}` }
}

/** Sends one message. Null once the receiver has answered 2xx; otherwise why not, in words that hold nothing of the secret. */
export const post = async (
  webhook: Webhook,
  of: { readonly id: string; readonly at: number; readonly body: string },
  signal?: AbortSignal,
): Promise<string | null> =>
  await new Promise((resolve) => {
    const done = (result: string | null): void => {
      clearTimeout(timer)
      resolve(result)
    }
    const outgoing = request(webhook.url, {
      method: 'POST',
      agent: false,
      ...(signal === undefined ? {} : { signal }),
      minVersion: 'TLSv1.2',
      ...(webhook.ca === undefined ? {} : { ca: webhook.ca }),
      maxHeaderSize: 16 << 10,
      headers: {
        ...webhookHeaders(webhook.secret, of),
        'content-type': 'application/json',
        'content-length': Buffer.byteLength(of.body),
        'user-agent': 'fleetkey',
      },
    })
    // The whole exchange, not the silence between two bytes: a receiver that trickles holds nothing up.
    const timer = setTimeout(() => {
      outgoing.destroy()
      done(`no answer within ${patience / 1000} s`)
    }, patience)
    outgoing.on('response', (response) => {
      const { statusCode = 0 } = response
      // What it says besides is not read.
      response.destroy()
      done(statusCode >= 200 && statusCode < 300 ? null : `answered ${statusCode}${statusCode >= 300 && statusCode < 400 ? ', which is not followed' : ''}`)
    })
    outgoing.on('error', (error) => done(error.message.slice(0, 200)))
    outgoing.end(of.body)
  })
